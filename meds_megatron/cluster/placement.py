"""Nodes and GPUs of ranks and engines: pure functions of the config, and the Ray options that follow.

A run owns its nodes whole. The trainer's nodes come first: rank r has one of their GPUs, which no other rank has.
Neighbouring ranks are one tensor-parallel group, which `config.validate` keeps within a node, then the data-parallel
ranks of a pipeline stage, then the stages: the most is sent over the shortest links. Every engine has `rollout.tensor`
neighbouring GPUs of one node: the same ones as the ranks, or with `rollout.nodes` those of further nodes. Without GPUs
only the node matters, and one machine may stand in for several.
"""

import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meds_megatron.cluster.fork_server import NO_GPUS, ForkServer
from meds_megatron.config import ClusterConfig, RolloutConfig
from meds_megatron.errors import UserError

ALLOCATOR_ENV_VARS = dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:False")
"""Settings of torch's allocator under both of their names, in place of inherited ones: from expandable segments neither
CUDA IPC can share memory nor can vLLM's engines sleep."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A node of the run, counted from 0, and some of its GPUs."""

    node: int
    gpus: tuple[int, ...]


def rank_places(cluster: ClusterConfig) -> list[Place]:
    """The place of each trainer rank: neighbouring ranks, and with them tensor-parallel groups, stay on one node."""
    return [
        Place(rank // cluster.ranks_per_node, (rank % cluster.ranks_per_node,))
        for rank in range(cluster.nodes * cluster.ranks_per_node)
    ]


def engine_places(cluster: ClusterConfig, rollout: RolloutConfig) -> list[Place]:
    """The place of each engine; round-robin over the nodes.

    `config.validate` has checked that the engines fit the GPUs.
    """
    first, nodes = (0, cluster.nodes) if rollout.nodes is None else (cluster.nodes, rollout.nodes)
    places = []
    for engine in range(rollout.engines):
        node, slot = engine % nodes, engine // nodes
        places.append(Place(first + node, tuple(range(slot * rollout.tensor, (slot + 1) * rollout.tensor))))
    return places


@dataclass(frozen=True)
class Node:
    """A reserved node, as a process on it sees it."""

    bundle: int
    """Number of its bundle in Ray's placement group."""
    host: str
    address: str
    gpus: tuple[str, ...]
    """Its reserved GPUs, as CUDA_VISIBLE_DEVICES names them: not from 0 on where others use GPUs of the node, too."""
    unreadable: tuple[str, ...]
    """Paths that the run needs and the node cannot read."""


def visible_gpus(place: Place, gpus: Sequence[str]) -> list[str]:
    """All of the node's GPUs, those of the place first: a process uses the first ones, and may open memory that a
    neighbour shares on any other."""
    return [*(gpus[slot] for slot in place.gpus), *(gpu for slot, gpu in enumerate(gpus) if slot not in place.gpus)]


class Placement:
    """The reserved nodes of a run, in the order of their host names."""

    def __init__(
        self, cluster: ClusterConfig, use_gpu: bool, engine_nodes: int = 0, fork_servers: Sequence[ForkServer] = ()
    ):
        """Requests the trainer's nodes and `engine_nodes` more; `wait` returns when Ray has reserved them. Processes
        without a GPU on this machine are forks of the server with their environment variables."""
        import ray
        from ray.util.placement_group import placement_group

        self._use_gpu = use_gpu
        self._gpus_per_node = cluster.ranks_per_node
        self.nodes = cluster.nodes + engine_nodes
        self._known: list[Node] = []
        self._fork_servers = fork_servers
        bundle = {"GPU": cluster.ranks_per_node} if use_gpu else {"CPU": 1e-3}
        machines = sum(node["Alive"] for node in ray.nodes())
        self._is_this_machine = machines == 1 and not use_gpu
        apart = use_gpu or machines >= self.nodes
        self._group = placement_group([bundle] * self.nodes, strategy="STRICT_SPREAD" if apart else "SPREAD")

    def close(self) -> None:
        """Frees the nodes; Ray ends the actors that are still placed there."""
        import ray
        from ray.util.placement_group import remove_placement_group

        try:
            remove_placement_group(self._group)
        except ray.exceptions.GetTimeoutError:
            # Ray frees them when the driver disconnects.
            logger.warning("Ray does not answer: its nodes are freed when the run ends")

    def wait(self, seconds: float, paths: Sequence[str | Path] = ()) -> bool:
        """Whether the nodes could be reserved within `seconds`. Raises UserError if one of them cannot read `paths`."""
        if not self._group.wait(seconds):
            return False
        self._known = sorted(self._looks(tuple(map(str, paths))), key=lambda node: _natural(node.host))
        for node in self._known:
            if node.unreadable:
                raise UserError(
                    f"{node.unreadable[0]}: node {node.host} ({node.address}) cannot read it; put it where all nodes "
                    "of the run see it under this path."
                )
        return True

    def _looks(self, paths: tuple[str, ...]) -> list[Node]:
        """The reserved nodes, each seen from a process on it."""
        import ray

        if self._is_this_machine:
            # Without a process of their own, which takes seconds to start.
            return [_look(bundle, paths) for bundle in range(self.nodes)]
        gpus = self._gpus_per_node if self._use_gpu else 0
        looks = [
            ray.remote(_look)
            .options(num_cpus=0, num_gpus=gpus, scheduling_strategy=self._strategy(bundle))
            .remote(bundle, paths)
            for bundle in range(self.nodes)
        ]
        return ray.get(looks)

    def options(self, place: Place, env_vars: dict[str, str]) -> dict[str, Any]:
        """Options of a Ray actor at `place`, with the environment variables of its process."""
        node = self._known[place.node] if self._known else None
        servers = [server for server in self._fork_servers if server.env_vars == env_vars and self._is_this_machine]
        runtime_env: dict[str, Any] = {"py_executable": servers[0].py_executable} if servers else {}
        env_vars = dict(env_vars)
        if not self._use_gpu:
            env_vars |= NO_GPUS
        else:
            assert node is not None  # GPUs are reserved first.
            # The run owns the reserved GPUs and assigns them itself: several actors share one.
            env_vars |= ALLOCATOR_ENV_VARS
            env_vars["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(place, node.gpus))
            env_vars["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        return {
            "num_cpus": 0,
            "num_gpus": 0,
            "runtime_env": runtime_env | {"env_vars": env_vars},
            "scheduling_strategy": self._strategy(place.node if node is None else node.bundle),
        }

    def _strategy(self, bundle: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)


def _look(bundle: int, paths: Sequence[str]) -> Node:
    """The node of the process that calls it, which has all of its reserved GPUs."""
    import ray

    # Neighbours in this order are neighbours on the node.
    gpus = tuple(sorted(map(str, ray.get_runtime_context().get_accelerator_ids()["GPU"]), key=_natural))
    unreadable = tuple(path for path in paths if not os.access(path, os.R_OK))
    return Node(bundle, socket.gethostname(), ray.util.get_node_ip_address(), gpus, unreadable)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts node2 before node10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
