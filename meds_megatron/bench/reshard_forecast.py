"""Predicted traffic and least time of weight updates of large models, from shapes and places alone."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from meds_megatron.config import ClusterConfig, RolloutConfig
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.launch.placement import engine_places, rank_places
from meds_megatron.weights.resharding.plan import ReshardPlan, Route, find_routes

# Model, trainer nodes, TP, PP, engines, engine TP, nodes of the engines' own (None: shared); nodes of 8 GPUs.
PLANS = [
    ("Qwen2.5-7B", 1, 4, 1, 8, 1, None),
    ("Qwen2.5-7B", 1, 4, 1, 2, 4, 1),
    ("Qwen2.5-32B", 4, 8, 2, 8, 4, None),
    ("Qwen2.5-32B", 4, 8, 2, 4, 8, 4),
    ("Qwen2.5-72B", 8, 8, 4, 8, 8, None),
    ("Qwen2.5-72B", 8, 8, 4, 4, 8, 4),
]


def forecasts(network_gbit: float, local_gbyte: float) -> list[dict]:
    """A row for each of PLANS, with the seconds that an update takes at least when a node sends and receives
    `network_gbit` Gbit/s each and a GPU exchanges `local_gbyte` GB/s with its neighbours."""
    return [predicted(*plan, network_gbit, local_gbyte) for plan in PLANS]


def predicted(
    model: str,
    nodes: int,
    tensor: int,
    pipeline: int,
    engines: int,
    engine_tensor: int,
    engine_nodes: int | None,
    network_gbit: float,
    local_gbyte: float,
    gpus: int = 8,
) -> dict:
    """Traffic of an update of all engines, as a row of a table; bytes in GiB of bfloat16 weights."""
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline, data=nodes * gpus // (tensor * pipeline))
    cluster = ClusterConfig(nodes=nodes, ranks_per_node=gpus)
    rollout = RolloutConfig(engines=engines, tensor=engine_tensor, nodes=engine_nodes)
    rank_nodes = [place.node for place in rank_places(cluster)]
    nodes_of_engines = [place.node for place in engine_places(cluster, rollout)]
    traffic = predict(
        ReshardPlan(QWEN[model], layout, engine_tensor),
        find_routes(layout, rank_nodes, nodes_of_engines),
        rank_nodes,
        nodes_of_engines,
        item_bytes=2,
        local_bytes_per_second=local_gbyte * 1e9,
        network_bytes_per_second=network_gbit / 8 * 1e9,
    )
    return {
        "model": model,
        "trainer": f"TP{layout.tensor} PP{layout.pipeline} DP{layout.data}",
        "engines": f"{engines} x TP{engine_tensor}",
        "placement": "colocated" if engine_nodes is None else "disaggregated",
        "network_gib": traffic.network_bytes / 2**30,
        "local_gib": traffic.local_bytes / 2**30,
        "gather_gib": traffic.gathered_bytes / 2**30,
        "predicted_s": traffic.seconds,
    }


@dataclass(frozen=True)
class Traffic:
    """Bytes of one weight update, and the seconds that they take at least."""

    local_bytes: int
    network_bytes: int
    gathered_bytes: int
    """Bytes that a gather in the trainer and whole tensors to every engine rank would move instead."""
    local_seconds: float
    network_seconds: float

    @property
    def seconds(self) -> float:
        """Both kinds of traffic run in parallel."""
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
    """Traffic of an update when weights have `item_bytes` an element.

    A local connection is one GPU's, both ways together; a network connection is one node's, each way. The busiest
    connection decides.
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
    for parameter in plan.table.stored:
        elements = sum(prod(shape) for shape in parameter.hf_shapes().values())
        delivered += elements * engines * plan.engine_tensor
        if parameter.split is not None:
            gathered += elements * (plan.layout.tensor - 1) // plan.layout.tensor
    return (gathered + delivered) * item_bytes


def _share_sizes(plan: ReshardPlan) -> dict[tuple[int, int, int], int]:
    """Elements by pipeline stage, trainer rank and engine rank."""
    sizes: dict[tuple[int, int, int], int] = defaultdict(int)
    for bucket in plan.buckets:
        for transfer in plan.transfers(bucket):
            sizes[plan.stage(bucket), transfer.trainer_rank, transfer.engine_rank] += transfer.elements
    return sizes
