"""The table of names and shapes at full size: every element of every tensor once, on every layout."""

from collections import defaultdict
from itertools import product
from math import prod

import pytest
import torch

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.errors import UserError
from meds_megatron.weights.table import TensorSlice, build_table, canonical_name, chunk_buckets, padded_vocab

LAYOUTS = {
    "Qwen2.5-0.5B": [(1, 1, 1), (2, 2, 2), (2, 4, 3)],
    "Qwen2.5-1.5B": [(1, 1, 1), (2, 2, 1), (4, 4, 1)],
    "Qwen2.5-3B": [(1, 1, 1), (2, 2, 1), (4, 4, 3)],
    "Qwen2.5-7B": [(1, 1, 1), (4, 2, 1), (4, 4, 7)],
    "Qwen2.5-14B": [(2, 1, 1), (4, 2, 2), (8, 4, 1)],
    "Qwen2.5-32B": [(8, 1, 1), (8, 2, 2), (4, 8, 1)],
    "Qwen2.5-72B": [(8, 4, 1), (8, 2, 2), (4, 8, 1)],
    "Qwen2.5-Math-1.5B": [(2, 4, 1)],
    "Qwen2.5-Math-7B": [(4, 1, 1), (4, 8, 1)],
    "Qwen2.5-Math-72B": [(8, 4, 1), (8, 6, 1)],
    "Qwen3-0.6B": [(1, 1, 1), (2, 2, 1), (8, 4, 1)],
    "Qwen3-1.7B": [(1, 1, 1), (2, 2, 7), (8, 1, 1)],
    "Qwen3-4B": [(1, 1, 1), (2, 2, 1), (8, 4, 3)],
    "Qwen3-8B": [(1, 1, 1), (4, 2, 1), (8, 4, 1)],
    "Qwen3-14B": [(2, 1, 1), (4, 2, 2), (8, 4, 1)],
    "Qwen3-32B": [(8, 1, 1), (8, 4, 2), (4, 8, 1)],
}


def transformers_shapes(shape):
    """Names and shapes of the tensors that transformers itself saves for this model."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

    kind = Qwen2Config if shape.architecture == "qwen2" else Qwen3Config
    config = kind(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_size,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tie_embeddings,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", QWEN)
def test_names_and_shapes_are_those_of_transformers(name):
    assert build_table(QWEN[name]).hf_shapes == transformers_shapes(QWEN[name])


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in QWEN for layout in LAYOUTS[name]])
def test_every_element_is_held_once(name, layout):
    shape, (tp, pp, vpp) = QWEN[name], layout
    table = build_table(shape, padded_vocab(shape.vocab_size, tp))
    produced = []
    parallel = ParallelLayout(tensor=tp, pipeline=pp, virtual=vpp)
    for stage, chunk in product(range(pp), range(vpp)):
        for bucket in chunk_buckets(parallel, stage, chunk, shape.num_layers):
            produced += [name for parameter in table.buckets[bucket] for name in check_parameter(parameter, tp)]
    assert sorted(produced) == sorted(table.hf_shapes)


def check_parameter(parameter, tp):
    """The names of the parameter's tensors; checks that the slices of all ranks tile them and the local shapes."""
    tiles = defaultdict(list)
    for rank in range(tp):
        slices = list(parameter.slices(rank, tp))
        assert {part.parameter for part in slices} <= {parameter.name}
        assert sum(part.elements for part in slices) <= prod(parameter.local_shape(tp))
        assert_disjoint([(part.local_start, part.size) for part in slices], parameter.local_shape(tp))
        for part in slices if parameter.split is not None or rank == 0 else []:
            tiles[part.hf_name].append((part.hf_start, part.size))
    for name, shape in parameter.hf_shapes().items():
        assert sum(prod(size) for _, size in tiles[name]) == prod(shape), name
        assert_disjoint(tiles[name], shape)
    return list(tiles)


def assert_disjoint(parts, whole):
    """Parts split along one dimension lie inside `whole` and do not overlap."""
    for start, size in parts:
        assert all(s >= 0 and s + n <= w for s, n, w in zip(start, size, whole, strict=True))
    dimension = next((d for d in range(len(whole)) if len({start[d] for start, _ in parts}) > 1), 0)
    ends = -1
    for start, size in sorted(parts, key=lambda part: part[0][dimension]):
        assert start[dimension] >= ends or ends == -1
        ends = start[dimension] + size[dimension]


def test_padding_belongs_to_no_tensor():
    shape = QWEN["Qwen2.5-72B"]
    rows = padded_vocab(shape.vocab_size, 5)
    assert (rows, padded_vocab(shape.vocab_size, 8)) == (152065, 152064)
    (parameter,) = build_table(shape, rows).buckets[0]
    assert parameter.local_shape(5) == (30413, 8192)
    assert [sum(part.size[0] for part in parameter.slices(rank, 5)) for rank in range(5)] == [30413] * 4 + [30412]


def test_transformer_engine_names_mean_the_same_parameters():
    table = build_table(QWEN["Qwen3-8B"])
    fused_norm = table.parameter("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", global_layer=9)
    assert fused_norm is table.parameter("decoder.layers.9.input_layernorm.weight")
    assert canonical_name("decoder.layers.3.mlp.linear_fc1.layer_norm_weight") == (
        "decoder.layers.3.pre_mlp_layernorm.weight"
    )
    assert canonical_name("embedding.word_embeddings.weight") == "embedding.word_embeddings.weight"


def test_refusals_name_the_parameter():
    table = build_table(QWEN["Qwen2.5-0.5B"])
    with pytest.raises(UserError, match=r"decoder\.layers\.0\.mlp\.router\.weight"):
        table.parameter("decoder.layers.0.mlp.router.weight")
    with pytest.raises(UserError, match=r"linear_proj\.weight: its 896 columns .* 3 tensor-parallel ranks"):
        table.parameter("decoder.layers.0.self_attention.linear_proj.weight").local_shape(3)


def test_intersection_moves_both_places():
    part = TensorSlice("w", "a", hf_start=(10, 4), local_start=(2, 0), size=(6, 8))
    assert part.intersect((slice(12, 99), slice(0, 6))) == TensorSlice("w", "a", (12, 4), (4, 0), (4, 2))
    assert part.intersect((slice(0, 99), slice(0, 99))) == part
    assert part.intersect((slice(16, 20), slice(0, 99))) is None
    assert part.rows(3, 5) == TensorSlice("w", "a", (11, 4), (3, 0), (2, 8))
