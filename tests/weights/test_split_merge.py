"""Tensors split for every tensor-parallel rank and merged back, and Megatron's orders written out independently."""

import pytest
import torch

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.gather import merge
from meds_megatron.weights.table import build_table, padded_vocab


def small(architecture="qwen3", tied=True, kv_heads=2, vocab=101):
    return ModelShape(architecture, 32, 2, 8, kv_heads, 8, 48, vocab, tied, 1e6, 1e-6, 64)


def random_tensors(table):
    return {name: torch.randn(shape) for name, shape in table.hf_shapes.items()}


def shard(parameter, tensors, rank, tp):
    local = torch.zeros(parameter.local_shape(tp))
    for part in parameter.slices(rank, tp):
        local[part.local_slices()] = tensors[part.hf_name][part.hf_slices()]
    return local


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_split_and_merge_give_the_tensors_back(architecture, tied, tp):
    shape = small(architecture, tied)
    table = build_table(shape, padded_vocab(shape.vocab_size, tp))
    tensors = random_tensors(table)
    merged = {}
    for parameter in table.stored:
        ranks = range(1 if parameter.split is None else tp)
        merged |= merge(parameter, [shard(parameter, tensors, rank, tp) for rank in ranks])
    assert merged.keys() == tensors.keys()
    assert all(torch.equal(merged[name], tensors[name]) for name in tensors)


def test_qkv_lies_kv_group_by_kv_group():
    shape = small(kv_heads=4)
    table = build_table(shape)
    tensors = random_tensors(table)
    parameter = table.parameter("decoder.layers.1.self_attention.linear_qkv.weight")
    q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    grouped = torch.cat([q.view(4, 2 * 8, 32), k.view(4, 8, 32), v.view(4, 8, 32)], dim=1)
    for rank in range(2):
        assert torch.equal(shard(parameter, tensors, rank, 2), grouped[2 * rank : 2 * rank + 2].reshape(-1, 32))


def test_gate_and_up_are_split_each_on_its_own():
    table = build_table(small())
    tensors = random_tensors(table)
    parameter = table.parameter("decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = (tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(shard(parameter, tensors, 1, 2), torch.cat([gate[24:], up[24:]]))


def test_rows_of_padding_stay_zero_on_the_last_rank():
    shape = small(vocab=101)
    table = build_table(shape, padded_vocab(101, 4))
    tensors = random_tensors(table)
    (parameter,) = table.buckets[0]
    last = shard(parameter, tensors, 3, 4)
    assert torch.equal(last[:23], tensors["model.embed_tokens.weight"][78:])
    assert not last[23:].any()
