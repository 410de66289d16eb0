"""Activations against what autograd keeps for megatron-core's layers, and the pipeline's share against its schedule."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from meds_megatron.config import QWEN, Config, ParallelConfig, ParallelLayout
from meds_megatron.plan.activations import chunks_under_way, layer_bytes
from tests.plan import meta_rank

SIZES = dict(hidden_size=256, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, ffn_size=768, vocab_size=512)
MODELS = {"qwen2": replace(QWEN["Qwen2.5-7B"], **SIZES), "qwen3": replace(QWEN["Qwen3-8B"], **SIZES)}


LENGTHS = [100, 28, 128]
"""Lengths of the packed sequences of a micro-batch."""


def config_of(parallel: dict, dtype: str) -> Config:
    config = Config(parallel=ParallelConfig(**parallel))
    config.model.dtype = dtype
    return config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("parallel", [{}, dict(tensor=2), dict(tensor=2, sequence=True)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_a_layer_keeps_the_predicted_bytes_for_the_backward_pass(cpu_ranks, model, parallel, dtype):
    config = config_of(parallel, dtype)
    (found,) = cpu_ranks.run(1, kept_bytes, MODELS[model], config)
    assert layer_bytes(config, MODELS[model], sum(LENGTHS), on_gpu=False) == found


def test_fused_norms_keep_less_and_sequence_parallelism_divides_the_norms():
    shape, plain = MODELS["qwen2"], config_of(dict(tensor=2), "bfloat16")
    split = config_of(dict(tensor=2, sequence=True), "bfloat16")
    tokens = sum(LENGTHS)
    whole = layer_bytes(plain, shape, tokens, on_gpu=True)
    results = 2 * shape.num_heads * shape.head_dim // 2
    assert layer_bytes(plain, shape, tokens, on_gpu=False) - whole == tokens * (2 * 6 * shape.hidden_size + results)
    assert whole - layer_bytes(split, shape, tokens, on_gpu=True) == 2 * tokens // 2 * (4 * shape.hidden_size + 4)


def kept_bytes(_rank: int, shape, config: Config) -> int:
    """Bytes of all tensors that autograd saves for one layer, each storage once, without the parameters."""
    from meds_megatron.model.attention import packed_sequences
    from meds_megatron.model.gpt import build_chunks, transformer_config

    meta_rank.install("cpu")
    dist.destroy_process_group()
    parallel = config.parallel
    tokens, sequences = sum(LENGTHS), packed_sequences(LENGTHS, "cpu")
    with meta_rank.rank_of(parallel, parallel.tensor, 0):
        (chunk,) = build_chunks(shape, transformer_config(shape, config.model, parallel), tokens)
        ours = {parameter.untyped_storage()._cdata for parameter in chunk.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        rows = tokens // parallel.tensor if parallel.sequence else tokens
        dtype = getattr(torch, config.model.dtype)
        hidden = torch.randn(rows, 1, shape.hidden_size, dtype=dtype, requires_grad=True)
        rope = chunk.rotary_pos_emb(max(LENGTHS), packed_seq=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunk.decoder.layers[0](hidden, attention_mask=None, rotary_pos_emb=rope, packed_seq_params=sequences)
    return sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in ours)


@pytest.mark.parametrize("count", [4, 8, 16])
@pytest.mark.parametrize(
    "layout", [dict(pipeline=2), dict(pipeline=4), dict(pipeline=2, virtual=2), dict(pipeline=4, virtual=3)]
)
def test_micro_batches_under_way_are_those_of_the_schedule(layout, count):
    layout = ParallelLayout(**layout)
    for stage in range(layout.pipeline):
        assert chunks_under_way(layout, stage, count) == simulated(layout, stage, count)


def simulated(layout: ParallelLayout, stage: int, count: int) -> list[int]:
    """The most activations that a stage holds together, by chunk, when megatron-core's schedule is played through."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(count, layout.virtual, layout.pipeline)
    order = [chunk for _, chunk in table]
    passes = len(order)
    if layout.virtual > 1:
        warm_up = min(passes, 2 * (layout.pipeline - stage - 1) + (layout.virtual - 1) * layout.pipeline)
    else:
        warm_up = min(passes, layout.pipeline - stage - 1)
    held, most = [0] * layout.virtual, [0] * layout.virtual
    for number in range(warm_up):
        held[order[number]] += 1
    most = list(held)
    for number in range(warm_up, passes):
        held[order[number]] += 1
        if sum(held) > sum(most):
            most = list(held)
        held[layout.virtual - 1 - order[number - warm_up]] -= 1
    return most
