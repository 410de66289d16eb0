"""One attempt at a run: all its parts, put together."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from meds_megatron.cluster.fork_server import ForkServer
from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import Stopped
from meds_megatron.faults.interruption import Interruption
from meds_megatron.logs import process_logging
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.run.checkpoint_files import Checkpoint
from meds_megatron.run.code_version import code_version
from meds_megatron.run.console import Console, ConsoleHandler
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog
from meds_megatron.trainer.checkpointer import Checkpointer, restore_engines
from meds_megatron.trainer.collector import Collector
from meds_megatron.trainer.generation import Generation
from meds_megatron.trainer.gpus import Gpus
from meds_megatron.trainer.loop import TrainingLoop
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.processes import Processes, start_processes
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.recorder import Recorder
from meds_megatron.trainer.scorer import Scorer
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.validation import Validator
from meds_megatron.trainer.weight_sync import WeightSync

logger = logging.getLogger(__name__)


def attempt(
    config: Config,
    model_dir: Path,
    prompts: Prompts,
    run: RunDirectory,
    interruption: Interruption,
    servers: Sequence[ForkServer] = (),
) -> None:
    """Trains from the newest checkpoint, or from the start, to the end. Raises RunFailed when a process died or hangs,
    and Stopped, after a checkpoint, when a signal asked for it."""
    with ExitStack() as stack:
        console = stack.enter_context(Console(config))
        stack.enter_context(process_logging(run.path, "driver", ConsoleHandler(console)))
        logger.info("code: %s", ", ".join(f"{name} {value}" for name, value in code_version().items()))
        if prompts.skipped:
            logger.warning("%d prompts are longer than rollout.max_prompt_tokens and were left out", prompts.skipped)
        run.check_functions(config)
        checkpoint = run.newest_checkpoint()
        run.rewind(checkpoint.step if checkpoint else None)
        console.phase("starting engines and trainer ranks")
        processes = start_processes(config, model_dir, run, console, interruption, stack, servers)
        state = TrainerState(PromptSampler(len(prompts.train), config.train.seed, config.data.shuffle))
        if checkpoint := _readable(run, checkpoint, processes.policy):
            state.load_state_dict(checkpoint.state)
            resume(checkpoint, processes)
        log = stack.enter_context(RunLog(run, config, console, state.wandb_id))
        state.wandb_id = log.wandb_id
        _train(config, model_dir, prompts, run, checkpoint, processes, state, log, interruption)
        if config.train.export_hf:
            console.note(f"the trained model is in {run.hf_export(state.step)}")


def _readable(run: RunDirectory, checkpoint: Checkpoint | None, policy: PolicyGroup) -> Checkpoint | None:
    """`checkpoint`, or the newest before it of which the ranks find the large files as they were written."""
    passed_over: dict[Path, str] = {}
    while checkpoint and (damage := policy.damage_of(str(checkpoint.path))):
        logger.warning("%s: the checkpoint is passed over", damage)
        passed_over[checkpoint.path] = damage
        checkpoint = run.newest_checkpoint(passed_over)
        run.rewind(checkpoint.step if checkpoint else None)
    return checkpoint


def _train(
    config: Config,
    model_dir: Path,
    prompts: Prompts,
    run: RunDirectory,
    checkpoint: Checkpoint | None,
    processes: Processes,
    state: TrainerState,
    log: RunLog,
    interruption: Interruption,
) -> None:
    """Trains with the started, and perhaps resumed, processes. Raises Stopped after a checkpoint."""
    policy, pool, memory, timer = processes.policy, processes.pool, processes.memory, processes.timer
    shape, shared_directory = ModelShape.from_hf(model_dir), str(processes.shared_directory)
    first_version = checkpoint.policy_version if checkpoint else 0
    weight_sync = WeightSync(config, shape, policy, pool, shared_directory, first_version)
    weight_sync.update()
    gpus = Gpus(pool, policy, timer)
    producer = GroupProducer(pool, processes.graders, config)
    generation = Generation(config, producer, pool, weight_sync, gpus, interruption, timer)
    scorer = Scorer(config, policy, memory, generation, timer)
    checkpointer = Checkpointer(config, run, model_dir, processes, state, weight_sync, checkpoint)
    training = TrainingLoop(
        config=config,
        state=state,
        collector=Collector(config, state, prompts, generation, scorer, gpus, timer),
        generation=generation,
        policy=policy,
        memory=memory,
        gpus=gpus,
        validator=Validator(config, prompts.validation, generation, timer),
        recorder=Recorder(config, run, log, pool, memory, timer),
        checkpointer=checkpointer,
    )
    processes.supervisor.started()
    timer.take()  # The start is no part of a step.
    try:
        training.train()
    except Stopped as stop:
        # Raised before the step changes the policy or the memory.
        path = checkpointer.save_last()
        saved = f"the run continues from {path}" if path else "nothing is saved (checkpoint.every=0)"
        raise interruption.stopped(f"{stop} after step {state.step - 1}: {saved}") from stop
    checkpointer.complete()


def resume(checkpoint: Checkpoint, processes: Processes) -> None:
    """Continues from a checkpoint. Under another layout the random states start from scratch."""
    policy = processes.policy
    same_layout = checkpoint.layout == asdict(policy.layout)
    policy.load(str(checkpoint.path), same_layout)
    for damage in processes.memory.restore(str(checkpoint.memory)):
        logger.warning("the error memory skipped a damaged file: %s", damage)
    if not (restore_engines(checkpoint, processes.pool) and same_layout):
        logger.warning("resumed under another layout: random states start from scratch")
    logger.info("resumed from %s", checkpoint.path)
