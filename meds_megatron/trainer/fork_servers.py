"""The fork servers of a run without GPUs: one for its ranks, one for its engines, whose environments differ."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from meds_megatron.actor import worker
from meds_megatron.cluster.fork_server import ForkServer
from meds_megatron.config import Config
from meds_megatron.rollout import engine
from meds_megatron.rollout.settings import engine_env_vars


@contextmanager
def fork_servers(config: Config) -> Iterator[Sequence[ForkServer]]:
    """Servers that import megatron-core and vLLM from now on, while the driver does its own part of the start; none for
    a run that has, or may have, GPUs or other machines."""
    with ExitStack() as stack:
        if not runs_here_without_gpu(config):
            yield ()
            return
        ranks = ForkServer(worker.rank_env_vars(config), f"{worker.__name__}:{worker.import_without_gpu.__name__}")
        engines = ForkServer(
            engine_env_vars(config, use_gpu=False), f"{engine.__name__}:{engine.import_without_gpu.__name__}"
        )
        servers = []
        for server in (engines, ranks):
            # Without room in shared memory or for a process, workers start in the ordinary way, or raise.
            with suppress(OSError):
                servers.append(stack.enter_context(server))
        yield servers


def runs_here_without_gpu(config: Config) -> bool:
    """Whether the ranks will be on this machine and have no GPU, as far as is known before torch is imported."""
    cluster = config.cluster
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return cluster.address is None and (cluster.device == "cpu" or (cluster.device == "auto" and not has_gpu))
