"""Which trainer rank serves which engine, and what that moves between nodes: pure functions of layout and nodes.

Every data-parallel replica of the trainer has all weights, so an engine is served by the replica's rank on its own node
where there is one (`local`: through the node's memory), and otherwise by one over the network. Engines take turns among
the replicas, so that no rank has to serve them all.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.weights.resharding.plan import ReshardPlan


@dataclass(frozen=True)
class Route:
    """How the share of one tensor- and pipeline-parallel coordinate reaches one engine."""

    engine: int
    stage: int
    trainer_rank: int
    """Tensor-parallel coordinate."""
    rank: int
    """The trainer rank that serves, of the whole world."""
    local: bool
    """Whether it is on the engine's node."""


def find_routes(
    layout: ParallelLayout, rank_nodes: list[int], engine_nodes: list[int], allow_local: bool = True
) -> list[Route]:
    """A route for every engine and every share of the model.

    `rank_nodes` and `engine_nodes` hold the node of each trainer rank and each engine. Without `allow_local` even
    neighbours use the network.
    """
    routes = []
    turns: dict[int, int] = defaultdict(int)
    for engine, node in enumerate(engine_nodes):
        turn, turns[node] = turns[node], turns[node] + 1
        for stage in range(layout.pipeline):
            for tensor in range(layout.tensor):
                replicas = [layout.rank(tensor, data, stage) for data in range(layout.data)]
                near = [rank for rank in replicas if allow_local and rank_nodes[rank] == node]
                rank = near[turn % len(near)] if near else replicas[engine % len(replicas)]
                routes.append(Route(engine, stage, tensor, rank, bool(near)))
    return routes


@dataclass(frozen=True)
class Traffic:
    """Bytes of one weight update, and the seconds that they take at least."""

    local_bytes: int
    network_bytes: int
    gathered_bytes: int
    """What a gather in the trainer and whole tensors to every engine rank would move instead."""
    local_seconds: float
    network_seconds: float

    @property
    def seconds(self) -> float:
        """Both kinds go on side by side."""
        return max(self.local_seconds, self.network_seconds)


def predict(
    plan: ReshardPlan,
    routes: Iterable[Route],
    rank_nodes: list[int],
    engine_nodes: list[int],
    *,
    item_bytes: int,
    local_bytes_per_second: float,
    network_bytes_per_second: float,
) -> Traffic:
    """What an update moves when weights have `item_bytes` an element.

    A local link is one GPU's, both ways together; a network link is one node's, each way. The busiest link decides.
    """
    routes = list(routes)
    local, network = 0, 0
    gpu: dict[tuple, int] = defaultdict(int)
    sent: dict[int, int] = defaultdict(int)
    received: dict[int, int] = defaultdict(int)
    sizes = _share_sizes(plan)
    for route in routes:
        for engine_rank in range(plan.engine_tensor):
            size = item_bytes * sizes[route.stage, route.trainer_rank, engine_rank]
            if route.local:
                local += size
                gpu["engine", route.engine, engine_rank] += size
                gpu["trainer", route.rank] += size
            else:
                network += size
                sent[rank_nodes[route.rank]] += size
                received[engine_nodes[route.engine]] += size
    busiest = max([*sent.values(), *received.values()], default=0)
    return Traffic(
        local_bytes=local,
        network_bytes=network,
        gathered_bytes=gathered_bytes(plan, len(engine_nodes), item_bytes),
        local_seconds=max(gpu.values(), default=0) / local_bytes_per_second,
        network_seconds=busiest / network_bytes_per_second,
    )


def gathered_bytes(plan: ReshardPlan, engines: int, item_bytes: int) -> int:
    """Bytes between ranks when each stage gathers its tensors on one rank, and every engine rank gets them whole."""
    gathered = delivered = 0
    for group in plan.groups:
        for entry in plan.table.groups[group]:
            if not entry.copy:
                elements = sum(prod(shape) for shape in entry.hf_shapes().values())
                delivered += elements * engines * plan.engine_tensor
                if entry.split is not None:
                    gathered += elements * (plan.layout.tensor - 1) // plan.layout.tensor
    return (gathered + delivered) * item_bytes


def _share_sizes(plan: ReshardPlan) -> dict[tuple[int, int, int], int]:
    """Elements by pipeline stage, trainer rank and engine rank."""
    sizes: dict[tuple[int, int, int], int] = defaultdict(int)
    for group in plan.groups:
        for parcel in plan.parcels(group):
            sizes[plan.stage(group), parcel.trainer_rank, parcel.engine_rank] += parcel.elements
    return sizes
