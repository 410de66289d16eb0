"""Predicted traffic and least time of weight updates of large models, from shapes and places alone."""

from math import prod

from meds_megatron.cluster.placement import engine_places, rank_places
from meds_megatron.config import ClusterConfig, RolloutConfig
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.plan.network import predict
from meds_megatron.weights.resharding.plan import ReshardPlan, find_routes

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
    plan = ReshardPlan(QWEN[model], layout, engine_tensor)
    traffic = predict(
        plan,
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
        "gather_gib": gathered_bytes(plan, engines, item_bytes=2) / 2**30,
        "predicted_s": traffic.seconds,
    }


def gathered_bytes(plan: ReshardPlan, engines: int, item_bytes: int) -> int:
    """Bytes between ranks when each stage gathers its tensors on one rank, and every engine rank gets them whole."""
    gathered = delivered = 0
    for parameter in plan.table.stored:
        elements = sum(prod(shape) for shape in parameter.hf_shapes().values())
        delivered += elements * engines * plan.engine_tensor
        if parameter.split is not None:
            gathered += elements * (plan.layout.tensor - 1) // plan.layout.tensor
    return (gathered + delivered) * item_bytes
