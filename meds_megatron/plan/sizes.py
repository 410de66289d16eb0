"""Elements of weights, gradients and optimizer state on a rank: exactly those that megatron-core allocates.

The shapes are the conversion table's. The buffers are those of megatron-core 0.16.1's `_ParamAndGradBuffer`: one for
each model chunk, parameters in reverse order, each beginning at a multiple of 64 elements, each bucket's end padded to
a multiple of lcm(data- and context-parallel ranks, 128). A bucket is a whole chunk, except that a tied embedding on
either end of a pipeline has one of its own. The distributed optimizer (ZeRO stage 1, arXiv 1910.02054) gives each data-
and context-parallel rank an equal slice of every bucket, of which padding has no state.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod

from meds_megatron.config import ModelShape, ParallelLayout
from meds_megatron.weights.resharding.plan import engine_slices
from meds_megatron.weights.table import OUTPUT_LAYER, Table, bucket_sizes, build_table, chunk_buckets, padded_vocab

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
GRADIENT_BYTES = 4
"""Gradients are accumulated in float32 (`actor.optimizer`)."""
_PARAMETER_MULTIPLE, _BUCKET_MULTIPLE = 64, 128

# Order of a layer's parameters in megatron-core's local layer spec, by the end of their names.
_ORDER = ("input_layernorm", "linear_proj", "linear_qkv", "q_layernorm", "k_layernorm", "pre_mlp", "fc1", "fc2")


@dataclass(frozen=True)
class RankSizes:
    """Elements on one rank."""

    parameters: int
    buffer: int
    """Parameters with padding; the gradients have as many."""
    optimizer: int
    """Parameters whose optimizer state this rank holds."""
    largest: int
    """The largest parameter."""

    def weight_bytes(self, dtype: str) -> int:
        return self.buffer * ITEM_BYTES[dtype]

    @property
    def gradient_bytes(self) -> int:
        return self.buffer * GRADIENT_BYTES

    def optimizer_bytes(self, dtype: str) -> int:
        """AdamW's two moments in float32, and float32 weights where the model's are not."""
        return self.optimizer * (8 if dtype == "float32" else 12)


@lru_cache(maxsize=4096)
def rank_sizes(shape: ModelShape, layout: ParallelLayout, stage: int, copy: int = 0) -> RankSizes:
    """Sizes on a rank of pipeline stage `stage` that holds copy `copy` of its parameters: context-parallel rank plus
    layout.context times data-parallel rank. Tensor-parallel ranks are alike."""
    parameters = buffer = optimizer = largest = 0
    for chunk in range(layout.virtual):
        elements = chunk_parameters(shape, layout, stage, chunk)
        parameters += sum(count for count, _ in elements)
        largest = max(largest, *(count for count, _ in elements))
        size, held = _buffer(elements, layout.copies, copy)
        buffer += size
        optimizer += held
    return RankSizes(parameters, buffer, optimizer, largest)


def chunk_parameters(shape: ModelShape, layout: ParallelLayout, stage: int, chunk: int) -> list[tuple[int, bool]]:
    """(elements, is a tied embedding that two stages hold) of each parameter of a model chunk on one rank, in the order
    of the model."""
    table = _table(shape, layout.tensor)
    layer = _layer_elements(shape, layout.tensor)
    elements: list[tuple[int, bool]] = []
    for bucket in chunk_buckets(layout, stage, chunk, shape.num_layers):
        if 1 <= bucket <= shape.num_layers:
            elements += [(count, False) for count in layer]
            continue
        for parameter in table.buckets[bucket]:
            tied = bucket == 0 and shape.tie_embeddings and layout.pipeline > 1
            elements.append((prod(parameter.local_shape(layout.tensor)), tied))
    is_last = (stage, chunk) == (layout.pipeline - 1, layout.virtual - 1)
    if is_last and shape.tie_embeddings and layout.pipeline > 1:
        elements.append((prod(table.parameters[OUTPUT_LAYER].local_shape(layout.tensor)), True))
    return elements


@lru_cache(maxsize=64)
def _table(shape: ModelShape, tensor: int) -> Table:
    return build_table(shape, padded_vocab(shape.vocab_size, tensor))


@lru_cache(maxsize=64)
def _layer_elements(shape: ModelShape, tensor: int) -> tuple[int, ...]:
    """Elements of each parameter of a layer; all layers are alike."""
    parameters = sorted(
        _table(shape, tensor).buckets[1],
        key=lambda parameter: next(place for place, part in enumerate(_ORDER) if part in parameter.name),
    )
    return tuple(prod(parameter.local_shape(tensor)) for parameter in parameters)


def _buffer(parameters: list[tuple[int, bool]], ranks: int, rank: int) -> tuple[int, int]:
    """Elements of a chunk's buffer, and of those with optimizer state of the `rank`-th of `ranks` copies."""
    multiple = lcm(ranks, _BUCKET_MULTIPLE)
    buckets: list[tuple[int, int, list[tuple[int, int]]]] = []
    held: list[tuple[int, int]] = []
    begin = end = 0

    def close() -> int:
        stop = _round_up(end, multiple)
        buckets.append((begin, stop, list(held)))
        held.clear()
        return stop

    for elements, alone in reversed(parameters):
        end = _round_up(end, _PARAMETER_MULTIPLE)
        if alone and held:
            begin = end = close()
        held.append((end, end + elements))
        end += elements
        if alone:
            begin = end = close()
    if held:
        begin = end = close()
    optimizer = 0
    for first, stop, ranges in buckets:
        share = (stop - first) // ranks
        mine = (first + rank * share, first + (rank + 1) * share)
        optimizer += sum(max(0, min(b, mine[1]) - max(a, mine[0])) for a, b in ranges)
    return end, optimizer


@lru_cache(maxsize=64)
def engine_elements(shape: ModelShape, tensor: int) -> int:
    """Elements of the model on rank 0 of an engine of `tensor` ranks; a tied head shares the embedding's."""
    table = _table(shape, 1)

    def held(bucket: int) -> int:
        shapes = {name: s for parameter in table.buckets[bucket] for name, s in parameter.hf_shapes().items()}
        return sum(
            prod(part.stop - part.start for part in engine_slices(shape, name, hf_shape, 0, tensor))
            for name, hf_shape in shapes.items()
        )

    return held(0) + shape.num_layers * held(1) + held(shape.num_layers + 1)


@lru_cache(maxsize=64)
def largest_bucket(shape: ModelShape) -> int:
    """Elements of the largest bucket of weights that is transferred at once (`weights.resharding.plan`)."""
    return max(bucket_sizes(_table(shape, 1)))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
