"""Nodes and GPUs of ranks and engines: pure functions of the config, and the Ray options that follow.

A run owns its nodes whole. The trainer's nodes come first: rank r has one of their GPUs, which no other rank has. Every
engine has `rollout.tensor` neighbouring GPUs of one node: the same ones as the ranks, or with `rollout.nodes` those of
further nodes. Without GPUs only the node matters, and one machine may stand in for several.
"""

from dataclasses import dataclass
from typing import Any

from meds_megatron.config import ClusterConfig, RolloutConfig


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


def visible_gpus(place: Place, gpus_per_node: int) -> list[int]:
    """All GPUs of the node, those of the place first: a process uses the first ones, and may open memory that a
    neighbour shares on any other."""
    return [*place.gpus, *(gpu for gpu in range(gpus_per_node) if gpu not in place.gpus)]


class Placement:
    """The reserved nodes of a run."""

    def __init__(self, cluster: ClusterConfig, use_gpu: bool, engine_nodes: int = 0):
        """Requests the trainer's nodes and `engine_nodes` more; `wait` returns when Ray has reserved them."""
        from ray.util.placement_group import placement_group

        self._use_gpu = use_gpu
        self._gpus_per_node = cluster.ranks_per_node
        bundle = {"GPU": cluster.ranks_per_node} if use_gpu else {"CPU": 1e-3}
        self.nodes = cluster.nodes + engine_nodes
        self._group = placement_group([bundle] * self.nodes, strategy="STRICT_SPREAD" if use_gpu else "SPREAD")

    def close(self) -> None:
        """Frees the nodes; Ray ends the actors that are still placed there."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)

    def wait(self, seconds: float) -> bool:
        """Whether the nodes could be reserved within `seconds`."""
        return self._group.wait(seconds)

    def options(self, place: Place, env_vars: dict[str, str]) -> dict[str, Any]:
        """Options of a Ray actor at `place`, with the environment variables of its process."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if not self._use_gpu:
            env_vars = env_vars | {"CUDA_VISIBLE_DEVICES": ""}
        else:
            # The run owns the reserved GPUs and assigns them itself: several actors share one.
            gpus = visible_gpus(place, self._gpus_per_node)
            env_vars = env_vars | {
                "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
                "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            }
        return {
            "num_cpus": 0,
            "num_gpus": 0,
            "runtime_env": {"env_vars": env_vars},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=place.node
            ),
        }
