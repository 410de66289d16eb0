"""`meds train`: from a config to a trained model."""

import logging
import secrets
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.config.validate import validate, validate_model
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.embedded.make import ensure_model
from meds_megatron.errors import RunFailed, Stopped, UserError
from meds_megatron.launch.cluster import NoNodes, ray_cluster, reserve_nodes
from meds_megatron.launch.device import resolve_device
from meds_megatron.logs import process_logging
from meds_megatron.plan.fit import check_fit
from meds_megatron.plan.hardware import H100
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.trainer import loop
from meds_megatron.trainer.checkpoint_files import Checkpoint
from meds_megatron.trainer.checkpointer import Checkpointer, restore_engines
from meds_megatron.trainer.console import Console, ConsoleHandler
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.interruption import EXIT_REQUEUE, Interruption
from meds_megatron.trainer.model_check import check_model_files
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.prompts import Prompts, read_prompts
from meds_megatron.trainer.recovery import Decision, Failure, Recovery
from meds_megatron.trainer.run_dir import RunDirectory
from meds_megatron.trainer.run_log import RunLog
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.supervision import ProcessDied, Supervisor
from meds_megatron.trainer.timer import PhaseTimer
from meds_megatron.trainer.watchdog import Hung, Watchdog
from meds_megatron.trainer.weight_sync import WeightSync
from meds_megatron.weights.resharding.shared_directory import PREFIX, SHARED_MEMORY, remove_unclaimed

logger = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Runs `config` to its end. Raises UserError, before anything is started, for what can be found out by then."""
    config.cluster.device = resolve_device(config.cluster)
    validate(config)
    check_machine(config)
    model_dir = ensure_model(config.model, config.data, config.cache_dir, report=_print_progress)
    shape = ModelShape.from_hf(model_dir)
    validate_model(config, shape)
    if config.cluster.device == "cuda":
        check_fit(config, shape, H100)
    prompts = read_prompts(config, check_model_files(model_dir, shape))
    run = RunDirectory(config.run_dir)
    with run.claim(config):
        checkpoint = run.newest_checkpoint()
        if checkpoint and checkpoint.step >= config.train.steps:
            _print_progress(f"{run.path} has finished its {checkpoint.step} steps: raise train.steps to go on")
            return
        # Processes on other nodes have other working directories.
        config.run_dir = str(run.path)
        with ray_cluster(config.cluster), Interruption() as interruption:
            _repeat(config, model_dir, prompts, run, interruption)


def _repeat(config: Config, model_dir: Path, prompts: Prompts, run: RunDirectory, interruption: Interruption) -> None:
    """Attempts the run until it is finished or `Recovery` gives it up."""
    recovery = Recovery(config.faults.max_restarts)
    while True:
        try:
            with ExitStack() as stack:
                _run(config, model_dir, prompts, run, interruption, stack)
            return
        except (RunFailed, NoNodes) as error:
            recovery.finished(run.last_logged_step())
            if interruption.requested.done():
                recovery.stop_requested()
            decision = recovery.failed(failure_of(error))
            if decision is Decision.REQUEUE:
                raise Stopped(f"{error}: ended to be started again", EXIT_REQUEUE) from error
            if decision is Decision.STOP:
                if isinstance(error, NoNodes):
                    raise
                raise RunFailed(
                    f"{error}; given up after {recovery.in_a_row} restarts without a new step (faults.max_restarts)"
                ) from error
            print(f"meds: {error}", file=sys.stderr)
            print(
                f"meds: restart {recovery.in_a_row} of at most {recovery.max_restarts} without a new step; step "
                f"{recovery.furthest} was finished last",
                file=sys.stderr,
            )


def resume(checkpoint: Checkpoint, policy: PolicyGroup, pool: EnginePool, memory: ErrorMemory) -> None:
    """Continues from a checkpoint. Under another layout the random states start anew."""
    same_layout = checkpoint.layout == asdict(policy.layout)
    policy.load(str(checkpoint.path), same_layout)
    for damage in memory.restore(str(checkpoint.memory)):
        logger.warning("the error memory goes on without a part: %s", damage)
    if not (restore_engines(checkpoint, pool) and same_layout):
        logger.warning("resumed under another layout: random states start anew")
    logger.info("resumed from %s", checkpoint.path)


def failure_of(error: Exception) -> Failure:
    """Kind of failure that ended an attempt."""
    kinds = {NoNodes: Failure.NO_NODES, ProcessDied: Failure.DIED, Hung: Failure.HUNG}
    return next((kind for error_class, kind in kinds.items() if isinstance(error, error_class)), Failure.ERROR)


def _run(
    config: Config,
    model_dir: Path,
    prompts: Prompts,
    run: RunDirectory,
    interruption: Interruption,
    stack: ExitStack,
) -> None:
    """One attempt: starts the parts of a run side by side, trains, and ends them in reverse order."""
    console = stack.enter_context(Console(config))
    stack.enter_context(process_logging(run.path, "driver", ConsoleHandler(console)))
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
        # vLLM measures the free memory of a GPU that a trainer rank shares with it: the rank has to be there first.
        policy.start()
    pool = EnginePool(config, str(model_dir), use_gpu, placement, alarm=supervisor.alarm)
    stack.callback(pool.close)
    timer = PhaseTimer(console)
    stack.enter_context(Watchdog(config.faults.hang_minutes, supervisor, timer, pool))
    memory = ErrorMemory(config, placement, supervisor)
    stack.callback(memory.close)
    reward = config.reward
    graders = stack.enter_context(GraderPool(reward.workers, reward.timeout_seconds, reward.memory_gib))
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


def _print_progress(text: str) -> None:
    print(f"meds: {text}", file=sys.stderr)
