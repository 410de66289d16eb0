"""Bytes that a step sends, by what sends them, and the traffic of a weight update.

Collectives are rings: an all-reduce of b bytes over n ranks sends 2 (n - 1) / n b from each, an all-gather or a
reduce-scatter half of that ("Bandwidth optimal all-reduce algorithms for clusters of workstations", Patarasuk and Yuan,
2009). What a layer sends with tensor and sequence parallelism is in arXiv 2205.05198, section 4.2.2.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from meds_megatron.cluster.placement import engine_places, rank_places
from meds_megatron.config import Config, ModelShape, ParallelLayout
from meds_megatron.config.layout import RankCoordinates
from meds_megatron.plan.engine import engine_item_bytes
from meds_megatron.plan.sizes import GRADIENT_BYTES, ITEM_BYTES, rank_sizes
from meds_megatron.weights.resharding.plan import ReshardPlan, Route, find_routes
from meds_megatron.weights.table import padded_vocab


@dataclass(frozen=True)
class Traffic:
    """Bytes of one weight update, and the seconds that they take at least."""

    local_bytes: int
    network_bytes: int
    local_seconds: float
    network_seconds: float

    @property
    def seconds(self) -> float:
        """Both kinds of traffic run in parallel."""
        return max(self.local_seconds, self.network_seconds)


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that the busiest rank sends in a step, and which of them cross nodes."""

    tensor_forward: int
    """Tensor-parallel collectives of the forward pass that scores the step."""
    tensor_update: int
    context_forward: int
    """Keys and values of the other context-parallel ranks."""
    context_update: int
    pipeline_forward: int
    pipeline_update: int
    data: int
    """Gradients to their owners and weights back, once an optimizer update."""
    tied: int
    """Gradients of a tied embedding, exchanged between the first and the last stage."""
    context_crosses: bool
    pipeline_crosses: bool
    data_crosses: bool
    weights: Traffic


def step_traffic(
    config: Config,
    shape: ModelShape,
    layout: ParallelLayout,
    *,
    tokens: float,
    local_bytes_per_second: float,
    network_bytes_per_second: float,
) -> StepTraffic:
    """Traffic of a step that trains on `tokens` tokens, prompts included, all ranks together."""
    item, tensor = ITEM_BYTES[config.model.dtype], layout.tensor
    updates = -(-config.train.prompts_per_step // config.train.mini_batch_prompts)
    # Hidden states of the tokens of one rank.
    hidden = tokens / layout.copies * shape.hidden_size * item
    layers = max(layout.stage_sizes(shape.num_layers))
    # In halves of an all-reduce. A layer has two all-reduces in each direction; with sequence parallelism each is a
    # reduce-scatter and an all-gather, and the backward pass gathers the inputs of two linear layers once more.
    forward, backward = 4, 6 if config.parallel.sequence else 4
    again = forward if config.model.recompute == "full" else 0
    half = hidden * layers * (tensor - 1) / tensor
    # Keys and values go once around the ranks of a group, in the backward pass again with their gradients (Transformer
    # Engine's ring; ours, without it, keeps what it has gathered).
    keys = 2 * tokens / layout.data * shape.num_kv_heads // tensor * shape.head_dim * item * layers
    around = keys * (layout.context - 1) / layout.context
    boundaries = 0 if layout.pipeline == 1 else layout.virtual
    across = hidden / (tensor if config.parallel.sequence else 1) * boundaries
    sizes = rank_sizes(shape, layout, 0)
    share = (layout.copies - 1) / layout.copies
    embedding = padded_vocab(shape.vocab_size, tensor) // tensor * shape.hidden_size * GRADIENT_BYTES
    tied = shape.tie_embeddings and layout.pipeline > 1
    return StepTraffic(
        tensor_forward=int(forward * half),
        tensor_update=int((forward + backward + again) * half),
        context_forward=int(around),
        context_update=int((4 if config.model.recompute == "full" else 3) * around),
        pipeline_forward=int(across),
        pipeline_update=int(2 * across),
        data=int(updates * share * (sizes.gradient_bytes + sizes.weight_bytes(config.model.dtype))),
        tied=updates * embedding if tied else 0,
        context_crosses=_crosses(config, layout, "context"),
        pipeline_crosses=_crosses(config, layout, "pipeline"),
        data_crosses=_crosses(config, layout, "data", "context"),
        weights=weight_update(config, shape, layout, local_bytes_per_second, network_bytes_per_second),
    )


def _crosses(config: Config, layout: ParallelLayout, *axes: Literal["data", "context", "pipeline"]) -> bool:
    """Whether the ranks of some group along the axes are on several nodes."""
    nodes: dict[RankCoordinates, set[int]] = defaultdict(set)
    for rank, place in enumerate(rank_places(config.cluster)):
        nodes[layout.coordinates(rank)._replace(**dict.fromkeys(axes, 0))].add(place.node)
    return any(len(found) > 1 for found in nodes.values())


def weight_update(
    config: Config,
    shape: ModelShape,
    layout: ParallelLayout,
    local_bytes_per_second: float,
    network_bytes_per_second: float,
) -> Traffic:
    """Traffic of one update of all engines of a run."""
    rank_nodes = [place.node for place in rank_places(config.cluster)]
    engine_nodes = [place.node for place in engine_places(config.cluster, config.rollout)]
    return predict(
        ReshardPlan(shape, layout, config.rollout.tensor),
        find_routes(layout, rank_nodes, engine_nodes, allow_local=config.sync.transport == "auto"),
        rank_nodes,
        engine_nodes,
        item_bytes=engine_item_bytes(config),
        local_bytes_per_second=local_bytes_per_second,
        network_bytes_per_second=network_bytes_per_second,
    )


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
    local, network = 0, 0
    gpu: dict[tuple, int] = defaultdict(int)
    sent: dict[int, int] = defaultdict(int)
    received: dict[int, int] = defaultdict(int)
    sizes = share_sizes(plan)
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
        local_seconds=max(gpu.values(), default=0) / local_bytes_per_second,
        network_seconds=busiest / network_bytes_per_second,
    )


def share_sizes(plan: ReshardPlan) -> dict[tuple[int, int, int], int]:
    """Elements by pipeline stage, trainer rank and engine rank."""
    sizes: dict[tuple[int, int, int], int] = defaultdict(int)
    layers = range(1, plan.shape.num_layers + 1)
    for bucket in plan.buckets:
        # All layers are alike: the transfers of the first stand for each.
        for transfer in plan.transfers(1 if bucket in layers else bucket):
            sizes[plan.pipeline_stage(bucket), transfer.trainer_rank, transfer.engine_rank] += transfer.elements
    return sizes
