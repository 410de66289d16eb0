"""The resharding plan: which slice of which trainer rank's parameter goes to which engine rank, and by which route.
Pure shapes, no tensors.

Trainer and engine split the same Hugging Face tensors differently: Megatron by tensor- and pipeline-parallel rank with
q, k and v interleaved by kv head, vLLM by its own tensor-parallel rank. `weights.table` lists the slices of a tensor
that a trainer rank holds, `engine_slices` gives the part that an engine rank needs, and the plan is their intersection:
every element that an engine rank needs is sent to it exactly once, nothing else is sent, and no trainer rank gathers
from another. Where both sides split alike, a slice is a trainer rank's whole share of a tensor.

Weights travel a bucket at a time: the embedding, each layer, the final norm with the head. No buffer on either side is
larger than the largest bucket, which for Qwen2.5-72B is its embedding of 2376 MiB in bfloat16.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import VLLM_VOCABULARY_MULTIPLE, ModelShape
from meds_megatron.weights.table import (
    HfShape,
    MegatronParameter,
    TensorSlice,
    bucket_sizes,
    build_table,
    chunk_buckets,
    padded_vocab,
)

# The dimension along which vLLM splits a layer's matrix; a bias is split like the rows of its matrix.
_SPLIT_DIMENSION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0)
_SPLIT_DIMENSION |= dict.fromkeys(("o_proj", "down_proj"), 1)


@dataclass(frozen=True)
class Transfer:
    """Slices of one bucket that tensor-parallel rank `trainer_rank` sends to engine rank `engine_rank`, in order."""

    bucket: int
    trainer_rank: int
    engine_rank: int
    slices: tuple[TensorSlice, ...]

    @property
    def elements(self) -> int:
        return sum(part.elements for part in self.slices)


class ReshardPlan:
    """Transfers from a trainer of one layout to engines of one tensor-parallel size."""

    def __init__(self, shape: ModelShape, layout: ParallelLayout, engine_tensor: int):
        self.shape = shape
        self.layout = layout
        self.engine_tensor = engine_tensor
        self.table = build_table(shape, padded_vocab(shape.vocab_size, layout.tensor))
        self._stages = {
            bucket: stage
            for stage in range(layout.pipeline)
            for chunk in range(layout.virtual)
            for bucket in chunk_buckets(layout, stage, chunk, shape.num_layers)
        }
        self._transfers = cache(self._make_transfers)

    @property
    def buckets(self) -> range:
        """Numbers of the buckets, in the order of the model."""
        return range(len(self.table.buckets))

    @property
    def largest_bucket(self) -> int:
        """Elements of the largest bucket: the bound of every buffer."""
        return max(bucket_sizes(self.table))

    def pipeline_stage(self, bucket: int) -> int:
        """The pipeline stage that holds the bucket."""
        return self._stages[bucket]

    def transfers(self, bucket: int) -> list[Transfer]:
        """All transfers of the bucket to one engine, by trainer rank and then by engine rank."""
        return self._transfers(bucket)

    def elements(self, bucket: int) -> int:
        """Elements of the bucket that travel to one engine, all its ranks together."""
        return sum(transfer.elements for transfer in self.transfers(bucket))

    def hf_shapes(self, bucket: int) -> dict[str, HfShape]:
        """Whole shapes of the bucket's Hugging Face tensors."""
        return {name: s for parameter in self.table.buckets[bucket] for name, s in parameter.hf_shapes().items()}

    def _make_transfers(self, bucket: int) -> list[Transfer]:
        transfers = []
        for trainer_rank in range(self.layout.tensor):
            for engine_rank in range(self.engine_tensor):
                # A parameter that all trainer ranks hold is sent to an engine rank by only one of them.
                replica = engine_rank * self.layout.tensor // self.engine_tensor
                slices = tuple(
                    needed
                    for parameter in self.table.buckets[bucket]
                    if parameter.split is not None or trainer_rank == replica
                    for needed in self._slices(parameter, trainer_rank, engine_rank)
                )
                if slices:
                    transfers.append(Transfer(bucket, trainer_rank, engine_rank, slices))
        return transfers

    def _slices(self, parameter: MegatronParameter, trainer_rank: int, engine_rank: int) -> Iterator[TensorSlice]:
        """The slices that the trainer rank holds and the engine rank needs."""
        shapes = parameter.hf_shapes()
        for held in parameter.slices(trainer_rank, self.layout.tensor):
            needed = engine_slices(self.shape, held.hf_name, shapes[held.hf_name], engine_rank, self.engine_tensor)
            if common := held.intersect(needed):
                yield common


def engine_slices(shape: ModelShape, hf_name: str, hf_shape: HfShape, rank: int, size: int) -> tuple[slice, ...]:
    """Index of the part of a Hugging Face tensor that vLLM's tensor-parallel rank `rank` of `size` holds.

    Source: the weight loaders of vLLM 0.32's `QKVParallelLinear`, `MergedColumnParallelLinear`, `RowParallelLinear` and
    `VocabParallelEmbedding`. The part of the vocabulary is empty where a rank has only rows of padding.
    Raises ValueError when the tensor cannot be split evenly.
    """
    parent, dimension = hf_name.split(".")[-2], 0
    if parent in ("embed_tokens", "lm_head"):
        share = -(-shape.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE // size
        first, last = (min(end * share, shape.vocab_size) for end in (rank, rank + 1))
    elif parent in ("k_proj", "v_proj") and shape.num_kv_heads < size:
        # Several ranks then hold the same key and value head.
        first = rank * shape.num_kv_heads // size * shape.head_dim
        last = first + shape.head_dim
    elif parent in _SPLIT_DIMENSION:
        dimension = _SPLIT_DIMENSION[parent]
        share, rest = divmod(hf_shape[dimension], size)
        if rest:
            raise ValueError(f"{hf_name}, {list(hf_shape)}, cannot be split over {size} engine ranks")
        first, last = rank * share, (rank + 1) * share
    else:
        first, last = 0, hf_shape[0]
    whole = [slice(0, length) for length in hf_shape]
    return (*whole[:dimension], slice(first, last), *whole[dimension + 1 :])


@dataclass(frozen=True)
class Route:
    """The trainer rank that serves one engine with the weights of one pipeline stage and tensor-parallel rank."""

    engine: int
    stage: int
    trainer_rank: int
    """Tensor-parallel rank."""
    rank: int
    """The serving rank, of the whole world."""
    local: bool
    """Whether the weights go through the memory of a node that both share, and not over the network."""


def find_routes(
    layout: ParallelLayout, rank_nodes: list[int], engine_nodes: list[int], allow_local: bool = True
) -> list[Route]:
    """A route for every engine, pipeline stage and tensor-parallel rank.

    Every data- and context-parallel replica of the trainer holds all weights. An engine is served by the replica's rank
    on its own node where there is one, and otherwise by one over the network; engines take turns among the replicas, so
    that no rank serves them all. `rank_nodes` and `engine_nodes` are the node of each trainer rank and of each engine.
    Without `allow_local` all routes use the network.
    """
    routes = []
    turns: dict[int, int] = defaultdict(int)
    for engine, node in enumerate(engine_nodes):
        turn, turns[node] = turns[node], turns[node] + 1
        for stage in range(layout.pipeline):
            for tensor in range(layout.tensor):
                replicas = [
                    layout.rank(tensor, context, data, stage)
                    for data in range(layout.data)
                    for context in range(layout.context)
                ]
                near = [rank for rank in replicas if allow_local and rank_nodes[rank] == node]
                rank = near[turn % len(near)] if near else replicas[engine % len(replicas)]
                routes.append(Route(engine, stage, tensor, rank, bool(near)))
    return routes
