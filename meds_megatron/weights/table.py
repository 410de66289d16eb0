"""The one table of names and shapes between Hugging Face and megatron-core, for Qwen2.5 and Qwen3.

Pure Python over shapes. A `MegatronParameter` is a row of the table: one or more blocks of rows taken from Hugging Face
tensors. `MegatronParameter.slices` lists, for one tensor-parallel rank, which slice of which Hugging Face tensor lies
where in the rank's parameter. Loading copies the slices one way, export the other, and the resharding plan intersects
them with the slices that an engine rank needs.

Names are those of Megatron's local layer spec, with the number of the layer in the whole model, counted from 0;
`canonical_name` converts Transformer Engine's names to that form.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError

HfShape = tuple[int, ...]

EMBED_TOKENS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
OUTPUT_LAYER = "output_layer.weight"

# Transformer Engine folds the norm before a linear layer into that layer.
TRANSFORMER_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TensorSlice:
    """A rectangular part of a Hugging Face tensor, and its place in one rank's Megatron parameter."""

    parameter: str
    """Name of the Megatron parameter."""
    hf_name: str
    hf_start: tuple[int, ...]
    """First index in the whole Hugging Face tensor."""
    local_start: tuple[int, ...]
    """First index in the rank's parameter."""
    size: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.size)

    def hf_slices(self) -> tuple[slice, ...]:
        """Index of the part in the whole Hugging Face tensor."""
        return tuple(slice(first, first + length) for first, length in zip(self.hf_start, self.size, strict=True))

    def local_slices(self) -> tuple[slice, ...]:
        """Index of the part in the rank's parameter."""
        return tuple(slice(first, first + length) for first, length in zip(self.local_start, self.size, strict=True))

    def intersect(self, region: tuple[slice, ...]) -> "TensorSlice | None":
        """The part that lies in `region` of the whole Hugging Face tensor; None if there is none."""
        own = self.hf_slices()
        begin = tuple(max(a.start, b.start) for a, b in zip(own, region, strict=True))
        size = tuple(min(a.stop, b.stop) - first for a, b, first in zip(own, region, begin, strict=True))
        if min(size) <= 0:
            return None
        offsets = zip(self.local_start, begin, self.hf_start, strict=True)
        local_start = tuple(local + first - own_first for local, first, own_first in offsets)
        return replace(self, hf_start=begin, local_start=local_start, size=size)

    def rows(self, first: int, stop: int) -> "TensorSlice | None":
        """The part in rows `first` to `stop` of the rank's parameter; None if there is none."""
        begin = self.hf_start[0] - self.local_start[0]
        return self.intersect((slice(begin + first, begin + stop), *self.hf_slices()[1:]))


@dataclass(frozen=True)
class Rows:
    """`count` rows of a Hugging Face tensor, from row `start`."""

    hf_name: str
    start: int
    count: int


@dataclass(frozen=True)
class Block:
    """Consecutive rows that are split as one; `padding` rows without a source come last."""

    rows: tuple[Rows, ...]
    padding: int = 0

    @property
    def size(self) -> int:
        return sum(rows.count for rows in self.rows) + self.padding


@dataclass(frozen=True)
class MegatronParameter:
    """One Megatron parameter: the Hugging Face tensors it is made of and how it is split over tensor-parallel ranks.

    `split` is None (every rank holds all of it), 0 (each block is split by rows, and a rank holds its part of the first
    block, then its part of the second, ...) or 1 (split by columns). `bucket` is the unit in which weights are
    transferred: 0 the embedding, 1..L the layers, L + 1 the final norm and head. `copy` marks the tied head of the last
    pipeline stage: filled from the embedding on loading, never exported.
    """

    name: str
    bucket: int
    blocks: tuple[Block, ...]
    columns: int | None = None
    """Columns of the whole parameter; None for a vector."""
    split: int | None = None
    copy: bool = False

    @property
    def rows(self) -> int:
        return sum(block.size for block in self.blocks)

    def hf_shapes(self) -> dict[str, HfShape]:
        """The whole shape of every Hugging Face tensor that the parameter holds."""
        row_counts: dict[str, int] = {}
        for block in self.blocks:
            for rows in block.rows:
                row_counts[rows.hf_name] = row_counts.get(rows.hf_name, 0) + rows.count
        tail = () if self.columns is None else (self.columns,)
        return {name: (count, *tail) for name, count in row_counts.items()}

    def local_shape(self, tp_size: int) -> tuple[int, ...]:
        """Shape of the parameter on one of `tp_size` tensor-parallel ranks."""
        if self.columns is None:
            return (self._share(self.rows, tp_size, 0),)
        return (self._share(self.rows, tp_size, 0), self._share(self.columns, tp_size, 1))

    def slices(self, tp_rank: int, tp_size: int) -> Iterator[TensorSlice]:
        """The slices that make up the parameter on rank `tp_rank` of `tp_size`; rows of padding belong to none."""
        columns = () if self.columns is None else (self._share(self.columns, tp_size, 1),)
        first_column = tuple(tp_rank * count if self.split == 1 else 0 for count in columns)
        zero = (0,) * len(columns)
        local_row = 0
        for block in self.blocks:
            count = self._share(block.size, tp_size, 0)
            begin = tp_rank * count if self.split == 0 else 0
            block_row = 0
            for rows in block.rows:
                first, last = max(block_row, begin), min(block_row + rows.count, begin + count)
                if first < last:
                    yield TensorSlice(
                        parameter=self.name,
                        hf_name=rows.hf_name,
                        hf_start=(rows.start + first - block_row, *first_column),
                        local_start=(local_row + first - begin, *zero),
                        size=(last - first, *columns),
                    )
                block_row += rows.count
            local_row += count

    def _share(self, size: int, tp_size: int, dimension: int) -> int:
        if self.split != dimension:
            return size
        if size % tp_size:
            kind = "rows" if dimension == 0 else "columns"
            raise UserError(
                f"{self.name}: its {size} {kind} cannot be split over {tp_size} tensor-parallel ranks;"
                f" choose parallel.tensor so that it divides {size}"
            )
        return size // tp_size


@dataclass(frozen=True)
class Table:
    """All parameters of one model."""

    parameters: dict[str, MegatronParameter]
    """Parameters by Megatron name, in the order of the model."""
    hf_shapes: dict[str, HfShape]
    """Every tensor of the Hugging Face directory."""
    buckets: list[list[MegatronParameter]] = field(repr=False)
    """The parameters of each bucket; a tied head, which is a copy, is in none."""

    @property
    def stored(self) -> list[MegatronParameter]:
        """The parameters of all buckets."""
        return [parameter for bucket in self.buckets for parameter in bucket]

    def parameter(self, megatron_name: str, global_layer: int | None = None) -> MegatronParameter:
        """The row of a parameter of either layer spec; `global_layer` replaces the layer number in the name.

        Raises UserError when the table has no such parameter.
        """
        name = canonical_name(megatron_name, global_layer)
        if name not in self.parameters:
            raise UserError(
                f"Megatron parameter {name} has no Hugging Face counterpart: the model must be a dense Qwen2.5 or Qwen3"
            )
        return self.parameters[name]


def padded_vocab(vocab_size: int, tp_size: int) -> int:
    """Rows of Megatron's embedding: `vocab_size`, rounded up only where `tp_size` ranks could not share it evenly."""
    return -(-vocab_size // tp_size) * tp_size


def canonical_name(megatron_name: str, global_layer: int | None = None) -> str:
    """A parameter's name as the local layer spec has it, with the layer number replaced by `global_layer` if given."""
    match = _LAYER_NAME.fullmatch(megatron_name)
    if match is None:
        return megatron_name
    layer = match[1] if global_layer is None else global_layer
    return f"decoder.layers.{layer}.{TRANSFORMER_ENGINE_NAMES.get(match[2], match[2])}"


def build_table(shape: ModelShape, vocab_rows: int | None = None) -> Table:
    """The table of a model whose Megatron embedding has `vocab_rows` rows, padding included (default: no padding).

    A table of a 72B model (80 layers) has a thousand parameters and is built in milliseconds.
    """
    padding = (vocab_rows or shape.vocab_size) - shape.vocab_size
    if padding < 0:
        raise ValueError(f"{vocab_rows} rows cannot hold a vocabulary of {shape.vocab_size}")
    last = shape.num_layers + 1
    head = EMBED_TOKENS if shape.tie_embeddings else LM_HEAD
    vocabulary: dict[str, Any] = dict(columns=shape.hidden_size, split=0, padding=padding)
    rows = [
        _single("embedding.word_embeddings.weight", EMBED_TOKENS, 0, shape.vocab_size, **vocabulary),
        *(parameter for layer in range(shape.num_layers) for parameter in _layer(shape, layer)),
        _single("decoder.final_layernorm.weight", "model.norm.weight", last, shape.hidden_size),
        _single(OUTPUT_LAYER, head, last, shape.vocab_size, **vocabulary, copy=shape.tie_embeddings),
    ]
    hf_shapes = {name: s for parameter in rows for name, s in parameter.hf_shapes().items()}
    buckets: list[list[MegatronParameter]] = [[] for _ in range(last + 1)]
    for parameter in rows:
        if not parameter.copy:
            buckets[parameter.bucket].append(parameter)
    return Table({parameter.name: parameter for parameter in rows}, hf_shapes, buckets)


def chunk_buckets(layout: ParallelLayout, stage: int, chunk: int, num_layers: int) -> list[int]:
    """The buckets that model chunk `chunk` of pipeline stage `stage` holds, in the order of the model."""
    first = stage == chunk == 0
    last = (stage, chunk) == (layout.pipeline - 1, layout.virtual - 1)
    layers = [layer + 1 for layer in layout.layers_of(stage, chunk, num_layers)]
    return [0] * first + layers + [num_layers + 1] * last


def bucket_sizes(table: Table) -> list[int]:
    """Elements of the Hugging Face tensors of each bucket."""
    return [sum(prod(s) for parameter in bucket for s in parameter.hf_shapes().values()) for bucket in table.buckets]


def _single(
    name: str,
    hf_name: str,
    bucket: int,
    rows: int,
    columns: int | None = None,
    split: int | None = None,
    padding: int = 0,
    copy: bool = False,
) -> MegatronParameter:
    """A parameter of one Hugging Face tensor."""
    return MegatronParameter(name, bucket, (Block((Rows(hf_name, 0, rows),), padding),), columns, split, copy)


def _layer(shape: ModelShape, layer: int) -> list[MegatronParameter]:
    mcore, hf, bucket = f"decoder.layers.{layer}.", f"model.layers.{layer}.", layer + 1
    hidden, ffn = shape.hidden_size, shape.ffn_size

    def plain(
        name: str, hf_name: str, rows: int, columns: int | None = None, split: int | None = None
    ) -> MegatronParameter:
        return _single(mcore + name, hf + hf_name, bucket, rows, columns, split)

    def qkv(kind: str, columns: int | None) -> MegatronParameter:
        block = _qkv_block(shape, hf, kind)
        return MegatronParameter(f"{mcore}self_attention.linear_qkv.{kind}", bucket, (block,), columns, split=0)

    # Gate and up are split separately: a rank holds its rows of gate, then its rows of up.
    gate_up = tuple(Block((Rows(f"{hf}mlp.{half}_proj.weight", 0, ffn),)) for half in ("gate", "up"))
    query_columns = shape.num_heads * shape.head_dim
    parameters = [
        plain("input_layernorm.weight", "input_layernorm.weight", hidden),
        qkv("weight", hidden),
        plain("self_attention.linear_proj.weight", "self_attn.o_proj.weight", hidden, query_columns, split=1),
        plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden),
        MegatronParameter(f"{mcore}mlp.linear_fc1.weight", bucket, gate_up, hidden, split=0),
        plain("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn, split=1),
    ]
    if shape.qkv_bias:
        parameters.append(qkv("bias", None))
    if shape.qk_norm:
        parameters.append(plain("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", shape.head_dim))
        parameters.append(plain("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", shape.head_dim))
    return parameters


def _qkv_block(shape: ModelShape, hf: str, kind: str) -> Block:
    """Rows of q, k and v in Megatron's order: for each kv head the query heads that share it, its key, its value."""
    query_rows = shape.num_heads // shape.num_kv_heads * shape.head_dim
    rows = []
    for head in range(shape.num_kv_heads):
        rows.append(Rows(f"{hf}self_attn.q_proj.{kind}", head * query_rows, query_rows))
        rows.append(Rows(f"{hf}self_attn.k_proj.{kind}", head * shape.head_dim, shape.head_dim))
        rows.append(Rows(f"{hf}self_attn.v_proj.{kind}", head * shape.head_dim, shape.head_dim))
    return Block(tuple(rows))
