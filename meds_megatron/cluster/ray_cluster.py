"""The Ray cluster of a run: connecting to it or starting it, and reserving its nodes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from meds_megatron.cluster.fork_server import ForkServer
from meds_megatron.cluster.placement import Placement
from meds_megatron.cluster.ray_directory import ray_directory
from meds_megatron.cluster.ray_output import redirect_ray_output
from meds_megatron.config import ClusterConfig, Config
from meds_megatron.errors import EXIT_REQUEUE, RayDied, UserError
from meds_megatron.processes import descendants, kill_tree

PLACEMENT_SECONDS = 120
START_TRIES = 3
"""Ray gives its processes 30 s to start, which may be too few on a machine with much other work."""
RAY_SETTINGS = {
    # From the death of the GCS until Ray ends the driver: for the run to save.
    "gcs_rpc_server_reconnect_timeout_s": 600,
    # Ray's agent serves them on all interfaces, to everyone.
    "enable_metrics_collection": False,
    # Workers in advance are for tasks without an environment of their own, of which a run has none.
    "prestart_worker_first_driver": False,
}
"""Settings of the Ray clusters that runs and Slurm jobs start."""

logger = logging.getLogger(__name__)


class RayCluster:
    """The Ray that the driver is connected to."""

    def __init__(self, address: str | None, directory: Path | None):
        """Without `address`, Ray is started on this machine, with its temporary files in `directory`."""
        self._address, self._directory = address, directory

    @property
    def is_own(self) -> bool:
        """Whether it is the run's own: it can be started again."""
        return self._address is None

    def start(self) -> None:
        """Connects. Raises RayDied when Ray does not start, as on a machine with far too much other work."""
        import ray

        redirect_ray_output()
        if not self.is_own:
            ray.init(address=self._address, log_to_driver=True, logging_level="warning")
            return
        assert self._directory is not None
        # Ray listens on all interfaces, and its own clusters accept only who has their token. It logs that at every
        # start.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        for left in reversed(range(START_TRIES)):
            before = descendants()
            try:
                ray.init(
                    # Without it, RAY_ADDRESS or a running Ray of this machine would be taken.
                    address="local",
                    include_dashboard=False,
                    logging_level="warning",
                    log_to_driver=True,
                    _temp_dir=str(self._directory / "ray"),
                    _system_config=dict(RAY_SETTINGS),  # Ray adds to it.
                )
                return
            except Exception as error:  # Ray has no class for it.
                # It does not end what it has started, nor does it forget a node that it started in part.
                ray.shutdown()
                for process in descendants() - before:
                    kill_tree(process)
                if not left:
                    raise RayDied(f"Ray did not start on this machine: {error}", EXIT_REQUEUE) from error
                logger.warning("Ray did not start on this machine and is started again: %s", error)

    def close(self) -> None:
        """Disconnects; a Ray of the run's own ends with all that runs on it."""
        import ray

        ray.shutdown(wait_for_processes=self.is_own)

    def restart(self) -> None:
        self.close()
        self.start()


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[RayCluster]:
    """Connects to the cluster at `config.address`, or starts Ray on this machine, for as long as the block lasts."""
    import ray

    if ray.is_initialized():
        raise RuntimeError("This process is connected to a Ray already: disconnect it first, with ray.shutdown()")
    with ray_directory() if config.address is None else nullcontext() as directory:
        cluster = RayCluster(config.address, directory)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.close()


class NodesUnavailable(UserError):
    """The Ray cluster does not have the nodes of the run."""


def reserve_nodes(
    config: Config, use_gpu: bool, paths: Sequence[str | Path] = (), fork_servers: Sequence[ForkServer] = ()
) -> Placement:
    """The nodes of the run. Raises NodesUnavailable when the Ray cluster does not have them in time, and UserError
    when one of them cannot read `paths`."""
    placement = Placement(config.cluster, use_gpu, config.rollout.nodes or 0, fork_servers)
    if not placement.wait(PLACEMENT_SECONDS, paths):
        kind = f" with {config.cluster.ranks_per_node} free GPUs each" if use_gpu else ""
        placement.close()
        raise NodesUnavailable(
            f"The Ray cluster did not have {placement.nodes} nodes{kind} within {PLACEMENT_SECONDS} s, but "
            f"{_machines(use_gpu)}: lower cluster.nodes, rollout.nodes or cluster.ranks_per_node, start Ray on more "
            "nodes, or set cluster.device=cpu to train without GPUs"
        )
    return placement


def _machines(use_gpu: bool) -> str:
    """The machines of the connected cluster, in words."""
    import ray

    names = [
        node["NodeManagerHostname"] + (f" with {node['Resources'].get('GPU', 0):.0f} GPUs" if use_gpu else "")
        for node in ray.nodes()
        if node["Alive"]
    ]
    return f"{len(names)}: {', '.join(sorted(names))}"
