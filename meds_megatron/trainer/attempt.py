"""One attempt at a run: all its parts, put together."""

import logging
import secrets
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import Stopped
from meds_megatron.launch.cluster import reserve_nodes
from meds_megatron.logs import process_logging
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.trainer import loop
from meds_megatron.trainer.checkpoint_files import Checkpoint
from meds_megatron.trainer.checkpointer import Checkpointer, restore_engines
from meds_megatron.trainer.code_version import code_version
from meds_megatron.trainer.console import Console, ConsoleHandler
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.interruption import Interruption
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.run_dir import RunDirectory
from meds_megatron.trainer.run_log import RunLog
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.supervision import Supervisor
from meds_megatron.trainer.timer import PhaseTimer
from meds_megatron.trainer.watchdog import Watchdog
from meds_megatron.trainer.weight_sync import WeightSync
from meds_megatron.weights.resharding.shared_directory import PREFIX, SHARED_MEMORY, remove_unclaimed

logger = logging.getLogger(__name__)


def attempt(config: Config, model_dir: Path, prompts: Prompts, run: RunDirectory, interruption: Interruption) -> None:
    """Trains from the newest checkpoint, or from the start, to the end. Raises RunFailed when a process died or hangs,
    and Stopped, after a checkpoint, when a signal asked for it."""
    with ExitStack() as stack:
        _attempt(config, model_dir, prompts, run, interruption, stack)


def _attempt(
    config: Config, model_dir: Path, prompts: Prompts, run: RunDirectory, interruption: Interruption, stack: ExitStack
) -> None:
    """Starts the parts of a run side by side, trains, and ends them in reverse order."""
    console = stack.enter_context(Console(config))
    stack.enter_context(process_logging(run.path, "driver", ConsoleHandler(console)))
    logger.info("code: %s", ", ".join(f"{name} {value}" for name, value in code_version().items()))
    if prompts.skipped:
        logger.warning("%d prompts are longer than rollout.max_prompt_tokens and were left out", prompts.skipped)
    checkpoint = run.newest_checkpoint()
    run.rewind(checkpoint.step if checkpoint else None)
    console.phase("starting engines and trainer ranks")
    use_gpu = config.cluster.device == "cuda"
    # Last, when no process has anything in shared memory any more.
    stack.callback(remove_unclaimed)
    shared_directory = SHARED_MEMORY / f"{PREFIX}weights-{secrets.token_hex(8)}"
    stack.callback(shutil.rmtree, shared_directory, ignore_errors=True)
    placement = reserve_nodes(config, use_gpu, paths=[model_dir, run.path])
    supervisor = stack.enter_context(Supervisor(config.run_dir, interruption))
    stack.callback(placement.close)
    policy = PolicyGroup(config, str(model_dir), placement, supervisor)
    stack.callback(policy.close)
    if use_gpu:
        # Loading needs more of a GPU than the rank keeps beside an engine.
        policy.start()
        if config.rollout.nodes is None:
            policy.free_memory()
    pool = EnginePool(config, str(model_dir), use_gpu, placement, alarm=supervisor.alarm)
    stack.callback(pool.close)
    timer = PhaseTimer(console)
    stack.enter_context(Watchdog(config.faults.hang_minutes, supervisor, timer, pool))
    memory = ErrorMemory(config, placement, supervisor)
    stack.callback(memory.close)
    reward = config.reward
    graders = stack.enter_context(GraderPool(reward.workers, reward.timeout_seconds, reward.memory_gib, reward.grader))
    state = TrainerState(PromptSampler(len(prompts.train), config.train.seed, config.data.shuffle))
    if checkpoint:
        state.load_state_dict(checkpoint.state)
    log = stack.enter_context(RunLog(run, config, console, state.wandb_id))
    state.wandb_id = log.wandb_id
    if not use_gpu:
        policy.start()
    pool.start()
    if checkpoint:
        resume(checkpoint, policy, pool, memory)
    shape = ModelShape.from_hf(model_dir)
    weight_sync = WeightSync(config, shape, policy, pool, str(shared_directory), state.policy_version)
    weight_sync.update()
    producer = GroupProducer(pool, graders, config)
    checkpointer = Checkpointer(config, run, model_dir, policy, pool, memory, state, checkpoint)
    supervisor.started()
    timer.take()  # The start is no part of a step.
    try:
        loop.train(
            config,
            state,
            prompts,
            policy,
            pool,
            weight_sync,
            producer,
            memory,
            checkpointer,
            run,
            log,
            timer,
            interruption,
        )
    except Stopped as stop:
        # Raised before the step changes the policy or the memory.
        path = checkpointer.save_last()
        saved = f"the run goes on from {path}" if path else "nothing is saved (checkpoint.every=0)"
        raise Stopped(f"{stop} after step {state.step - 1}: {saved}", stop.exit_code) from stop
    checkpointer.complete()
    if config.train.export_hf:
        console.note(f"the trained model is in {run.hf_export(state.step)}")


def resume(checkpoint: Checkpoint, policy: PolicyGroup, pool: EnginePool, memory: ErrorMemory) -> None:
    """Continues from a checkpoint. Under another layout the random states start anew."""
    same_layout = checkpoint.layout == asdict(policy.layout)
    policy.load(str(checkpoint.path), same_layout)
    for damage in memory.restore(str(checkpoint.memory)):
        logger.warning("the error memory goes on without a part: %s", damage)
    if not (restore_engines(checkpoint, pool) and same_layout):
        logger.warning("resumed under another layout: random states start anew")
    logger.info("resumed from %s", checkpoint.path)
