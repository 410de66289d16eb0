"""The one table of names and shapes between Hugging Face and megatron-core, for Qwen2.5 and Qwen3.

Pure Python over shapes. Each Megatron parameter is described by an `Entry`: one or more blocks of rows taken from
Hugging Face tensors. `Entry.pieces` turns it into boxes: which box of which Hugging Face tensor lies where in one
tensor-parallel rank's parameter. Loading copies the boxes one way, export the other, and a resharding plan intersects
them with the boxes that the other side wants.

Names are Megatron's own with the layer's place in the whole model, counted from 0, as its local layer spec has them;
`canonical_name` brings Transformer Engine's names into that form.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.errors import UserError

if TYPE_CHECKING:
    from meds_megatron.config.model_shape import ModelShape

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
class Piece:
    """A box of one Hugging Face tensor, and where the same box lies in a rank's Megatron parameter."""

    hf_name: str
    hf_start: tuple[int, ...]
    local_start: tuple[int, ...]
    size: tuple[int, ...]

    def hf_slices(self) -> tuple[slice, ...]:
        """The box within the whole Hugging Face tensor."""
        return box_slices(self.hf_start, self.size)

    def local_slices(self) -> tuple[slice, ...]:
        """The box within the rank's parameter."""
        return box_slices(self.local_start, self.size)

    def within(self, first: int, count: int) -> "Piece | None":
        """The part in `count` rows of the parameter from row `first`, placed relative to that row; None if empty."""
        row, *rest = self.local_start
        begin, end = max(row, first), min(row + self.size[0], first + count)
        if begin >= end:
            return None
        hf_start = (self.hf_start[0] + begin - row, *self.hf_start[1:])
        return Piece(self.hf_name, hf_start, (begin - first, *rest), (end - begin, *self.size[1:]))


@dataclass(frozen=True)
class Rows:
    """`count` rows of a Hugging Face tensor, from row `start`."""

    hf_name: str
    start: int
    count: int


@dataclass(frozen=True)
class Block:
    """Rows that follow each other and are shared out as one; `padding` rows without a source come last."""

    rows: tuple[Rows, ...]
    padding: int = 0

    @property
    def size(self) -> int:
        return sum(rows.count for rows in self.rows) + self.padding


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: the Hugging Face tensors it is made of and how it is split over tensor-parallel ranks.

    `split` is None (every rank has all of it), 0 (each block is cut by rows, and a rank holds its part of the first
    block, then its part of the second, ...) or 1 (cut by columns). `group` is the unit in which weights are streamed:
    0 the embedding, 1..L the layers, L + 1 the final norm and head. `copy` marks the tied head of the last pipeline
    stage: filled from the embedding on loading, never exported.
    """

    name: str
    group: int
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
            return (self._cut(self.rows, tp_size, 0),)
        return (self._cut(self.rows, tp_size, 0), self._cut(self.columns, tp_size, 1))

    def pieces(self, tp_rank: int, tp_size: int) -> Iterator[Piece]:
        """The boxes that make up the parameter on rank `tp_rank` of `tp_size`; rows of padding belong to none."""
        columns = () if self.columns is None else (self._cut(self.columns, tp_size, 1),)
        first_column = tuple(tp_rank * count if self.split == 1 else 0 for count in columns)
        zero = (0,) * len(columns)
        local_row = 0
        for block in self.blocks:
            count = self._cut(block.size, tp_size, 0)
            begin = tp_rank * count if self.split == 0 else 0
            block_row = 0
            for rows in block.rows:
                first, last = max(block_row, begin), min(block_row + rows.count, begin + count)
                if first < last:
                    hf_row = rows.start + first - block_row
                    yield Piece(
                        hf_name=rows.hf_name,
                        hf_start=(hf_row, *first_column),
                        local_start=(local_row + first - begin, *zero),
                        size=(last - first, *columns),
                    )
                block_row += rows.count
            local_row += count

    def _cut(self, size: int, tp_size: int, dimension: int) -> int:
        if self.split != dimension:
            return size
        if size % tp_size:
            kind = "rows" if dimension == 0 else "columns"
            raise UserError(
                f"{self.name}: its {size} {kind} cannot be shared out over {tp_size} tensor-parallel ranks;"
                f" choose parallel.tensor so that it divides {size}"
            )
        return size // tp_size


@dataclass(frozen=True)
class Table:
    """All entries of one model, by Megatron name (`entries`) and by streaming group (`groups`)."""

    entries: dict[str, Entry]
    hf_shapes: dict[str, HfShape]
    """Every tensor of the Hugging Face directory."""
    groups: list[list[Entry]] = field(repr=False)

    def entry(self, megatron_name: str, global_layer: int | None = None) -> Entry:
        """The entry of a parameter of either layer spec; `global_layer` stands in for the layer number in the name."""
        name = canonical_name(megatron_name, global_layer)
        try:
            return self.entries[name]
        except KeyError:
            raise UserError(
                f"Megatron parameter {name} has no Hugging Face counterpart: the model must be a dense Qwen2.5 or Qwen3"
            ) from None


def box_slices(start: tuple[int, ...], size: tuple[int, ...]) -> tuple[slice, ...]:
    """The index of a box by its first index and its length in every dimension."""
    return tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))


def row_slabs(piece: Piece, max_rows: int) -> Iterator[Piece]:
    """The piece cut into pieces of at most `max_rows` rows."""
    for row in range(0, piece.size[0], max_rows):
        yield Piece(
            piece.hf_name,
            (piece.hf_start[0] + row, *piece.hf_start[1:]),
            (piece.local_start[0] + row, *piece.local_start[1:]),
            (min(max_rows, piece.size[0] - row), *piece.size[1:]),
        )


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


def build_table(shape: "ModelShape", vocab_rows: int | None = None) -> Table:
    """The table of a model whose Megatron embedding has `vocab_rows` rows, padding included (default: no padding).

    A table of a 72B model (80 layers) has a thousand entries and is built in milliseconds.
    """
    padding = (vocab_rows or shape.vocab_size) - shape.vocab_size
    if padding < 0:
        raise ValueError(f"{vocab_rows} rows cannot hold a vocabulary of {shape.vocab_size}")
    groups = [[_vocabulary("embedding.word_embeddings.weight", EMBED_TOKENS, 0, shape, padding)]]
    groups += [_layer(shape, layer) for layer in range(shape.num_layers)]
    last = shape.num_layers + 1
    head = EMBED_TOKENS if shape.tie_embeddings else LM_HEAD
    groups.append(
        [
            _plain("decoder.final_layernorm.weight", "model.norm.weight", last, shape.hidden_size),
            _vocabulary(OUTPUT_LAYER, head, last, shape, padding, copy=shape.tie_embeddings),
        ]
    )
    entries = {entry.name: entry for group in groups for entry in group}
    hf_shapes = {name: s for entry in entries.values() for name, s in entry.hf_shapes().items()}
    return Table(entries, hf_shapes, groups)


def chunk_groups(layout: ParallelLayout, stage: int, chunk: int, num_layers: int) -> list[int]:
    """The streaming groups that model chunk `chunk` of pipeline stage `stage` holds, in the order of the model."""
    first = stage == chunk == 0
    last = (stage, chunk) == (layout.pipeline - 1, layout.virtual - 1)
    layers = [layer + 1 for layer in layout.layers_of(stage, chunk, num_layers)]
    return [0] * first + layers + [num_layers + 1] * last


def group_sizes(table: Table) -> list[int]:
    """Elements of the Hugging Face tensors of each streaming group."""
    return [
        sum(prod(s) for entry in group if not entry.copy for s in entry.hf_shapes().values()) for group in table.groups
    ]


def _vocabulary(name: str, hf_name: str, group: int, shape: "ModelShape", padding: int, copy: bool = False) -> Entry:
    block = Block((Rows(hf_name, 0, shape.vocab_size),), padding)
    return Entry(name, group, (block,), shape.hidden_size, split=0, copy=copy)


def _plain(
    name: str, hf_name: str, group: int, rows: int, columns: int | None = None, split: int | None = None
) -> Entry:
    return Entry(name, group, (Block((Rows(hf_name, 0, rows),)),), columns, split)


def _layer(shape: "ModelShape", layer: int) -> list[Entry]:
    mcore, hf, group = f"decoder.layers.{layer}.", f"model.layers.{layer}.", layer + 1
    hidden, ffn = shape.hidden_size, shape.ffn_size

    def plain(name: str, hf_name: str, rows: int, columns: int | None = None, split: int | None = None) -> Entry:
        return _plain(mcore + name, hf + hf_name, group, rows, columns, split)

    def qkv(kind: str, columns: int | None) -> Entry:
        block = _qkv_block(shape, hf, kind)
        return Entry(f"{mcore}self_attention.linear_qkv.{kind}", group, (block,), columns, split=0)

    # Gate and up are shared out separately: a rank holds its rows of gate, then its rows of up.
    gate_up = tuple(Block((Rows(f"{hf}mlp.{half}_proj.weight", 0, ffn),)) for half in ("gate", "up"))
    entries = [
        plain("input_layernorm.weight", "input_layernorm.weight", hidden),
        qkv("weight", hidden),
        plain(
            "self_attention.linear_proj.weight",
            "self_attn.o_proj.weight",
            hidden,
            shape.num_heads * shape.head_dim,
            split=1,
        ),
        plain("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", hidden),
        Entry(f"{mcore}mlp.linear_fc1.weight", group, gate_up, hidden, split=0),
        plain("mlp.linear_fc2.weight", "mlp.down_proj.weight", hidden, ffn, split=1),
    ]
    if shape.qkv_bias:
        entries.append(qkv("bias", None))
    if shape.qk_norm:
        entries.append(plain("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", shape.head_dim))
        entries.append(plain("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", shape.head_dim))
    return entries


def _qkv_block(shape: "ModelShape", hf: str, kind: str) -> Block:
    """Rows of q, k and v in Megatron's order: for each kv head the query heads that share it, its key, its value."""
    query_rows = shape.num_heads // shape.num_kv_heads * shape.head_dim
    rows = []
    for head in range(shape.num_kv_heads):
        rows.append(Rows(f"{hf}self_attn.q_proj.{kind}", head * query_rows, query_rows))
        rows.append(Rows(f"{hf}self_attn.k_proj.{kind}", head * shape.head_dim, shape.head_dim))
        rows.append(Rows(f"{hf}self_attn.v_proj.{kind}", head * shape.head_dim, shape.head_dim))
    return Block(tuple(rows))
