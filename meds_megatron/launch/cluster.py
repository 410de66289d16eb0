"""The Ray cluster of a run: connecting to it, and reserving its nodes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from meds_megatron.config import ClusterConfig, Config
from meds_megatron.errors import UserError
from meds_megatron.launch.fork_server import ForkServer
from meds_megatron.launch.placement import Placement

PLACEMENT_SECONDS = 120
NO_SPARE_WORKERS = {"prestart_worker_first_driver": False}
"""Ray starts workers in advance for tasks without an environment of their own, of which a run has none."""
TOKEN = Path.home() / ".ray" / "auth_token"
"""Where Ray keeps the token of the clusters that it starts on this machine."""


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[None]:
    """Connects to the cluster at `config.address`, or starts Ray on this machine, for as long as the block lasts."""
    import ray

    if config.address is not None:
        ray.init(address=config.address, log_to_driver=True, logging_level="warning")
    else:
        # Ray listens on all interfaces, and its own clusters accept only who has the token in the user's home. It logs
        # that at every start.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        # "local": without it, RAY_ADDRESS or a running Ray of this machine would be taken.
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level="warning",
            log_to_driver=True,
            _system_config=NO_SPARE_WORKERS,
        )
        if TOKEN.is_file():
            # Ray makes it as readable as any new file.
            TOKEN.chmod(0o600)
    try:
        yield
    finally:
        ray.shutdown()


class NoNodes(UserError):
    """The Ray cluster does not have the nodes of the run."""


def reserve_nodes(
    config: Config, use_gpu: bool, paths: Sequence[str | Path] = (), fork_servers: Sequence[ForkServer] = ()
) -> Placement:
    """The nodes of the run. Raises NoNodes when the Ray cluster does not have them in time, and UserError when one of
    them cannot read `paths`."""
    placement = Placement(config.cluster, use_gpu, config.rollout.nodes or 0, fork_servers)
    if not placement.wait(PLACEMENT_SECONDS, paths):
        kind = f" with {config.cluster.ranks_per_node} free GPUs each" if use_gpu else ""
        placement.close()
        raise NoNodes(
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
