"""The resharding plan: which box of which trainer rank's parameter goes to which engine rank. Pure shapes, no tensors.

Trainer and engine cut the same Hugging Face tensors differently: Megatron by tensor- and pipeline-parallel rank with q,
k and v interleaved by group of heads, vLLM by its own tensor-parallel rank. `weights.table` says which boxes of a
tensor a trainer rank holds, `engine_box` which one an engine rank needs, and the plan is their intersection: every
element that an engine rank needs is sent to it exactly once, nothing else is, and no trainer rank gathers from another.
Where both sides cut alike, a box is a trainer rank's whole share of a tensor.

Weights travel a group at a time: the embedding, each layer, the final norm with the head. No buffer on either side is
larger than the largest group, which for Qwen2.5-72B is its embedding of 2376 MiB in bfloat16.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.weights.table import (
    Entry,
    HfShape,
    Piece,
    Table,
    build_table,
    chunk_groups,
    group_sizes,
    padded_vocab,
)

if TYPE_CHECKING:
    from meds_megatron.config.model_shape import ModelShape

ENGINE_VOCAB_MULTIPLE = 64
"""vLLM rounds the vocabulary up to a multiple of this before it shares it out."""

# The dimension along which vLLM cuts a layer's matrix; a bias is cut like the rows of its matrix.
_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_COLUMNS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Range:
    """What an engine rank needs of a Hugging Face tensor: the first index and the length in every dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    def intersect(self, other: "Range") -> "Range | None":
        start = tuple(map(max, self.start, other.start))
        ends = zip(self.start, self.size, other.start, other.size, strict=True)
        stop = tuple(min(a + n, b + m) for a, n, b, m in ends)
        size = tuple(last - first for first, last in zip(start, stop, strict=True))
        return Range(start, size) if all(length > 0 for length in size) else None


@dataclass(frozen=True)
class Box(Piece):
    """A piece that one trainer rank sends to one engine rank."""

    entry: str
    """Name of the Megatron parameter, as the table has it."""

    @property
    def elements(self) -> int:
        return prod(self.size)


@dataclass(frozen=True)
class Parcel:
    """What tensor-parallel rank `trainer_rank` sends to engine rank `engine_rank` of one group, in this order."""

    group: int
    trainer_rank: int
    engine_rank: int
    boxes: tuple[Box, ...]

    @property
    def elements(self) -> int:
        return sum(box.elements for box in self.boxes)


class ReshardPlan:
    """From a trainer of one layout to engines of one tensor-parallel size."""

    def __init__(self, shape: "ModelShape", layout: ParallelLayout, engine_tensor: int):
        self.shape = shape
        self.layout = layout
        self.engine_tensor = engine_tensor
        self.table: Table = build_table(shape, padded_vocab(shape.vocab_size, layout.tensor))
        self._stages = {
            group: stage
            for stage in range(layout.pipeline)
            for chunk in range(layout.virtual)
            for group in chunk_groups(layout, stage, chunk, shape.num_layers)
        }
        self._parcels = cache(self._make_parcels)

    @property
    def groups(self) -> range:
        """Numbers of the groups, in the order of the model."""
        return range(len(self.table.groups))

    def stage(self, group: int) -> int:
        """The pipeline stage that holds a group."""
        return self._stages[group]

    def parcels(self, group: int) -> list[Parcel]:
        """All parcels of a group, by trainer rank and then by engine rank."""
        return self._parcels(group)

    def hf_shapes(self, group: int) -> dict[str, HfShape]:
        """The whole shapes of a group's tensors, as the engines expect them."""
        entries = self.table.groups[group]
        return {name: shape for entry in entries if not entry.copy for name, shape in entry.hf_shapes().items()}

    def elements(self, group: int) -> int:
        """Elements that travel to one engine, all its ranks together."""
        return sum(parcel.elements for parcel in self.parcels(group))

    @property
    def largest_group(self) -> int:
        """Elements of the largest group: the bound of every buffer."""
        return max(group_sizes(self.table))

    def _make_parcels(self, group: int) -> list[Parcel]:
        return [
            Parcel(group, trainer_rank, engine_rank, boxes)
            for trainer_rank in range(self.layout.tensor)
            for engine_rank in range(self.engine_tensor)
            if (boxes := tuple(self._boxes(group, trainer_rank, engine_rank)))
        ]

    def _boxes(self, group: int, trainer_rank: int, engine_rank: int):
        for entry in self.table.groups[group]:
            if entry.copy or not self._sends(entry, trainer_rank, engine_rank):
                continue
            shapes = entry.hf_shapes()
            for piece in entry.pieces(trainer_rank, self.layout.tensor):
                wanted = engine_box(self.shape, piece.hf_name, shapes[piece.hf_name], engine_rank, self.engine_tensor)
                common = Range(piece.hf_start, piece.size).intersect(wanted)
                if common:
                    offsets = zip(piece.local_start, common.start, piece.hf_start, strict=True)
                    local_start = tuple(local + first - begin for local, first, begin in offsets)
                    yield Box(piece.hf_name, common.start, local_start, common.size, entry.name)

    def _sends(self, entry: Entry, trainer_rank: int, engine_rank: int) -> bool:
        """Whether the trainer rank may send: of a parameter that all have, one rank does for each engine rank."""
        return entry.split is not None or trainer_rank == engine_rank * self.layout.tensor // self.engine_tensor


def engine_box(shape: "ModelShape", hf_name: str, hf_shape: HfShape, rank: int, size: int) -> Range:
    """What vLLM's tensor-parallel rank `rank` of `size` takes of a Hugging Face tensor.

    Source: the weight loaders of vLLM 0.32's `QKVParallelLinear`, `MergedColumnParallelLinear`, `RowParallelLinear` and
    `VocabParallelEmbedding`. A box of the vocabulary is empty where a rank has only rows of padding.
    """
    parent = hf_name.split(".")[-2]
    if parent in ("embed_tokens", "lm_head"):
        share = -(-shape.vocab_size // ENGINE_VOCAB_MULTIPLE) * ENGINE_VOCAB_MULTIPLE // size
        first = min(rank * share, shape.vocab_size)
        return _cut(hf_shape, 0, first, min(share, shape.vocab_size - first))
    if parent in ("k_proj", "v_proj") and shape.num_kv_heads < size:
        # Several ranks then have the same key and value head.
        return _cut(hf_shape, 0, rank * shape.num_kv_heads // size * shape.head_dim, shape.head_dim)
    for dimension, parents in enumerate((_ROWS, _COLUMNS)):
        if parent in parents:
            share, rest = divmod(hf_shape[dimension], size)
            if rest:
                raise ValueError(f"{hf_name}, {list(hf_shape)}, cannot be cut for {size} engine ranks")
            return _cut(hf_shape, dimension, rank * share, share)
    return Range((0,) * len(hf_shape), hf_shape)


def interleaved(plan: ReshardPlan) -> list[int]:
    """The groups in an order in which the pipeline stages take turns, so that they work side by side."""
    stages = [plan.stage(group) for group in plan.groups]
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(stages), 1) if a != b), len(stages)]
    runs = [list(plan.groups)[first:last] for first, last in pairwise(starts)]
    turns = range(max(map(len, runs)))
    return [run[turn] for turn in turns for run in runs if turn < len(run)]


def _cut(shape: HfShape, dimension: int, start: int, length: int) -> Range:
    starts, sizes = [0] * len(shape), list(shape)
    starts[dimension], sizes[dimension] = start, length
    return Range(tuple(starts), tuple(sizes))
