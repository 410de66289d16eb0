"""`meds train`: from a config to a trained model."""

import logging
import secrets
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.validate import validate, validate_model
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.embedded.make import ensure_model
from meds_megatron.errors import UserError
from meds_megatron.launch.cluster import ray_cluster, reserve_nodes
from meds_megatron.logs import process_logging
from meds_megatron.plan.fit import check_fit
from meds_megatron.plan.hardware import H100
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.trainer import loop
from meds_megatron.trainer.console import Console, ConsoleHandler
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.prompts import Prompts, read_prompts
from meds_megatron.trainer.run_dir import RunDirectory
from meds_megatron.trainer.run_log import RunLog
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.timer import PhaseTimer
from meds_megatron.trainer.weight_sync import WeightSync
from meds_megatron.weights.resharding.types import SHARED_MEMORY

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Runs `config` to its end. Raises UserError, before anything is started, for what can be found out by then."""
    config.cluster.device = resolve_device(config.cluster.device)
    validate(config)
    check_machine(config)
    model_dir = ensure_model(config.model, config.data, config.cache_dir, report=_print_progress)
    shape = ModelShape.from_hf(model_dir)
    validate_model(config, shape)
    if config.cluster.device == "cuda":
        check_fit(config, shape, H100)
    prompts = read_prompts(config, model_dir)
    run = RunDirectory.create(config)
    # Processes on other nodes have other working directories.
    config.run_dir = str(run.path)
    try:
        with ExitStack() as stack:
            _run(config, model_dir, prompts, run, stack)
    except UserError:
        run.discard_if_empty()
        raise
    except BaseException:
        run.discard_if_empty(keep_logs=True)
        raise


def _run(config: Config, model_dir: Path, prompts: Prompts, run: RunDirectory, stack: ExitStack) -> None:
    """Starts the parts of a run side by side, trains, and ends them in reverse order."""
    console = stack.enter_context(Console(config))
    stack.enter_context(process_logging(run.path, "driver", ConsoleHandler(console)))
    if prompts.skipped:
        logger.warning("%d prompts are longer than rollout.max_prompt_tokens and were left out", prompts.skipped)
    console.phase("starting engines and trainer ranks")
    use_gpu = config.cluster.device == "cuda"
    stack.enter_context(ray_cluster(config.cluster))
    # Removed last, when no rank can write into it any more.
    shared_directory = SHARED_MEMORY / f"meds-weights-{secrets.token_hex(8)}"
    stack.callback(shutil.rmtree, shared_directory, ignore_errors=True)
    placement = reserve_nodes(config, use_gpu)
    policy = PolicyGroup(config, str(model_dir), placement)
    stack.callback(policy.close)
    if use_gpu:
        # vLLM measures the free memory of a GPU that a trainer rank shares with it: the rank has to be there first.
        policy.start()
    pool = EnginePool(config, str(model_dir), use_gpu, placement)
    stack.callback(pool.close)
    memory = ErrorMemory(config, placement)
    stack.callback(memory.close)
    graders = stack.enter_context(GraderPool(config.reward.workers, config.reward.timeout_seconds))
    state = TrainerState(PromptSampler(len(prompts.train), config.train.seed, config.data.shuffle))
    log = stack.enter_context(RunLog(run, config, console, state.wandb_id))
    state.wandb_id = log.wandb_id
    if not use_gpu:
        policy.start()
    pool.start()
    shape = ModelShape.from_hf(model_dir)
    weight_sync = WeightSync(config, shape, policy, pool, str(shared_directory), state.policy_version)
    weight_sync.update()
    producer = GroupProducer(pool, graders, config)
    loop.train(config, state, prompts, policy, pool, weight_sync, producer, memory, run, log, PhaseTimer(console))
    if config.train.export_hf:
        console.note(f"the trained model is in {run.hf_export(state.step)}")


def check_machine(config: Config) -> None:
    """Raises UserError for a run that this machine cannot hold."""
    cluster = config.cluster
    if cluster.device == "cuda" and cluster.address is None:
        import torch

        if torch.cuda.device_count() < cluster.ranks_per_node:
            raise UserError(
                f"cluster.ranks_per_node = {cluster.ranks_per_node}, but this machine has {torch.cuda.device_count()} "
                "GPUs; lower it, and parallel.tensor and parallel.pipeline with it"
            )


def resolve_device(device: str) -> str:
    """`auto` becomes `cuda` on a machine that has it, else `cpu`."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _print_progress(text: str) -> None:
    print(f"meds: {text}", file=sys.stderr)
