"""The parts of a run, started together and ended together."""

import logging
import secrets
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.data.problems import load_problems
from meds_megatron.data.prompts import Prompt, build_prompts
from meds_megatron.embedded.arithmetic import arithmetic_problems
from meds_megatron.errors import UserError
from meds_megatron.launch.placement import Placement
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.trainer.console import Console
from meds_megatron.trainer.memory_group import MemoryGroup
from meds_megatron.trainer.metrics import MetricsLog, PhaseTimer
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.run_dir import RunDirectory
from meds_megatron.trainer.sync import WeightSync
from meds_megatron.weights.resharding.transport.shared_memory import ROOT as SHARED_MEMORY

PLACEMENT_SECONDS = 120


@dataclass
class Prompts:
    """What is trained on and what is validated on."""

    train: list[Prompt]
    validation: list[Prompt]
    skipped: int
    """Prompts left out because they are too long."""


@dataclass
class Parts:
    """Everything that the loop gives work to."""

    config: Config
    prompts: list[Prompt]
    validation_prompts: list[Prompt]
    policy: PolicyGroup
    engines: EngineGroup
    memory: MemoryGroup
    graders: GraderPool
    run: RunDirectory
    log: MetricsLog
    console: Console
    timer: PhaseTimer
    sync: WeightSync

    def validation_due(self, step: int) -> bool:
        """Before the first step, every `validate_every` steps and after the last one, if there are prompts for it."""
        every = self.config.train.validate_every
        if not every or not self.validation_prompts:
            return False
        return step % every == 0 or step == self.config.train.steps

    def export_due(self, step: int) -> bool:
        """Every `export_every` steps and after the last one."""
        train = self.config.train
        on_time = train.export_every and step % train.export_every == 0
        return train.export_hf and bool(on_time or step == train.steps)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows and stores the metrics of a step."""
        self.log.log(step, metrics)
        self.console.step(step, metrics)


def read_prompts(config: Config, model_dir: Path) -> Prompts:
    """The prompts of both data sets, encoded for the model in `model_dir`. Raises UserError for what cannot be used."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    data, longest = config.data, config.rollout.max_prompt_tokens

    def prompts(sources: list[str], limit: int | None, split: str) -> tuple[list[Prompt], int]:
        if not sources:
            return [], 0
        arithmetic = partial(arithmetic_problems, split, data.arithmetic_rules, seed=config.train.seed)
        problems = load_problems(sources, limit, {"arithmetic": arithmetic})
        return build_prompts(problems, tokenizer, data, longest)

    train, skipped_train = prompts(data.train, data.limit_train, "train")
    validation, skipped_validation = prompts(data.validation, data.limit_validation, "validation")
    return Prompts(train, validation, skipped_train + skipped_validation)


def start_parts(
    config: Config, model_dir: Path, prompts: Prompts, run: RunDirectory, console: Console, stack: ExitStack
) -> Parts:
    """Starts all parts side by side and returns when each is ready; `stack` ends them."""
    use_gpu = config.cluster.device == "cuda"
    # Cleared last, when no rank can write into it any more.
    directory = shared_directory(stack)
    placement = reserve_nodes(config, use_gpu)
    policy = PolicyGroup(config, str(model_dir), placement)
    stack.callback(policy.close)
    if use_gpu:
        # vLLM measures the free memory of a GPU that a trainer rank shares with it: the rank has to be there first.
        policy.start()
    engines = EngineGroup(config, str(model_dir), use_gpu, placement, read_weights=False)
    stack.callback(engines.close)
    engines.on_failure = console.note
    memory = MemoryGroup(config, placement)
    stack.callback(memory.close)
    graders = stack.enter_context(GraderPool(config.reward.workers, config.reward.timeout_seconds))
    log = stack.enter_context(MetricsLog(run, config))
    if not use_gpu:
        policy.start()
    engines.start()
    sync = WeightSync(config, ModelShape.from_hf(model_dir), policy, engines, directory)
    engines.refill = sync.fill
    engines.before_waking = policy.free_cached_memory
    sync.update(version=0)
    return Parts(
        config=config,
        prompts=prompts.train,
        validation_prompts=prompts.validation,
        policy=policy,
        engines=engines,
        memory=memory,
        graders=graders,
        run=run,
        log=log,
        console=console,
        timer=PhaseTimer(on_phase=console.phase),
        sync=sync,
    )


def reserve_nodes(config: Config, use_gpu: bool) -> Placement:
    """The nodes of the run. Raises UserError when the Ray cluster does not have them."""
    placement = Placement(config.cluster, use_gpu, config.rollout.nodes or 0)
    if not placement.wait(PLACEMENT_SECONDS):
        kind = f" with {config.cluster.ranks_per_node} free GPUs each" if use_gpu else ""
        raise UserError(
            f"The Ray cluster did not have {placement.nodes} nodes{kind} within {PLACEMENT_SECONDS} s: lower "
            "cluster.nodes, rollout.nodes or cluster.ranks_per_node, or start Ray on more nodes"
        )
    return placement


def shared_directory(stack: ExitStack) -> str:
    """A name in the shared memory of every node; `stack` clears what is left there on this one."""
    directory = SHARED_MEMORY / f"meds-weights-{secrets.token_hex(8)}"
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    return str(directory)


def start_ray(config: Config, stack: ExitStack) -> None:
    """Joins the cluster that the config names, or starts Ray on this machine without its dashboard."""
    if config.cluster.address is not None:
        ray.init(address=config.cluster.address, log_to_driver=True, logging_level="warning")
    else:
        # Ray guards its own cluster with a token, and says so at every start.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(include_dashboard=False, logging_level="warning", log_to_driver=True)
    stack.callback(ray.shutdown)
