"""The processes of an attempt at a run, started side by side."""

import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from meds_megatron.cluster.fork_server import ForkServer
from meds_megatron.cluster.ray_cluster import reserve_nodes
from meds_megatron.config import Config
from meds_megatron.config.functions import function_files
from meds_megatron.faults.interruption import Interruption
from meds_megatron.faults.supervision import Supervisor
from meds_megatron.faults.watchdog import Watchdog
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.run.console import Console
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.shared_memory import PREFIX, SHARED_MEMORY, remove_unclaimed
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.policy_group import PolicyGroup


@dataclass(frozen=True)
class Processes:
    """The processes of an attempt, and what supervises them."""

    policy: PolicyGroup
    pool: EnginePool
    memory: ErrorMemory
    graders: GraderPool
    supervisor: Supervisor
    timer: PhaseTimer
    shared_directory: Path
    """Directory for weights in the shared memory of every node."""


def start_processes(
    config: Config,
    model_dir: Path,
    run: RunDirectory,
    console: Console,
    interruption: Interruption,
    stack: ExitStack,
    servers: Sequence[ForkServer] = (),
) -> Processes:
    """Starts all processes side by side and waits until they have loaded the model; `stack` ends them in reverse
    order."""
    use_gpu = config.cluster.device == "cuda"
    # Last, when no process has anything in shared memory any more.
    stack.callback(remove_unclaimed)
    shared_directory = SHARED_MEMORY / f"{PREFIX}weights-{secrets.token_hex(8)}"
    stack.callback(shutil.rmtree, shared_directory, ignore_errors=True)
    paths: list[str | Path] = [model_dir, run.path, *function_files(config)]
    placement = reserve_nodes(config, use_gpu, paths, fork_servers=servers)
    supervisor = stack.enter_context(Supervisor(config.run_dir, interruption))
    # A GCS that has ended would be waited for.
    stack.callback(lambda: None if interruption.is_ray_dead else placement.close())
    policy = PolicyGroup(config, str(model_dir), placement, supervisor)
    stack.callback(policy.close)
    if use_gpu:
        # Loading needs more of a GPU than the rank keeps next to an engine.
        policy.start()
        if config.rollout.nodes is None:
            policy.offload()
    pool = EnginePool(config, str(model_dir), use_gpu, placement, alarm=supervisor.alarm)
    stack.callback(pool.close)
    timer = PhaseTimer(console)
    reward = config.reward
    graders = stack.enter_context(GraderPool(reward.workers, reward.timeout_seconds, reward.memory_gib, reward.grader))
    stack.enter_context(Watchdog(config.faults.hang_minutes, supervisor, timer, pool, graders))
    memory = ErrorMemory(config, placement, supervisor)
    stack.callback(memory.close)
    if not use_gpu:
        policy.start()
    pool.start()
    return Processes(policy, pool, memory, graders, supervisor, timer, shared_directory)
