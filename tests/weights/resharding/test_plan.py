"""The resharding plan at full size, against an independent account of what vLLM's ranks hold."""

import subprocess
import sys
from functools import cache
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN, ModelShape
from meds_megatron.weights.resharding.plan import ReshardPlan, engine_slices
from meds_megatron.weights.resharding.staging import BlockAllocator, begins_and_ends, interleaved, staging_elements
from meds_megatron.weights.table import TensorSlice
from tests.tiers import FULL

# (trainer TP, PP, VPP, engine TP): alike on both sides, more and fewer engine ranks than trainer ranks.
LAYOUTS = {
    "Qwen2.5-0.5B": [(1, 1, 1, 1), (2, 2, 2, 2), (2, 4, 3, 1), (1, 2, 1, 2)],
    "Qwen2.5-1.5B": [(1, 1, 1, 2), (2, 2, 1, 1), (2, 4, 1, 4)],
    "Qwen2.5-3B": [(1, 1, 1, 1), (2, 2, 1, 2), (2, 4, 3, 4)],
    "Qwen2.5-7B": [(1, 1, 1, 4), (4, 2, 1, 4), (4, 4, 7, 2)],
    "Qwen2.5-14B": [(2, 1, 1, 8), (4, 2, 2, 4), (8, 4, 1, 2)],
    "Qwen2.5-32B": [(8, 1, 1, 8), (8, 2, 2, 4), (4, 8, 1, 8)],
    "Qwen2.5-72B": [(8, 4, 1, 8), (8, 2, 2, 8), (4, 8, 1, 8), (8, 4, 2, 4)],
    "Qwen3-0.6B": [(1, 1, 1, 1), (2, 2, 1, 4), (8, 4, 1, 2)],
    "Qwen3-1.7B": [(1, 1, 1, 16), (2, 2, 7, 2), (8, 1, 1, 8)],
    "Qwen3-4B": [(1, 1, 1, 1), (2, 2, 1, 4), (8, 4, 3, 8)],
    "Qwen3-8B": [(1, 1, 1, 2), (4, 2, 1, 4), (8, 4, 1, 1)],
    "Qwen3-14B": [(2, 1, 1, 2), (4, 2, 2, 8), (8, 4, 1, 4)],
    "Qwen3-32B": [(8, 1, 1, 8), (8, 4, 2, 4), (4, 8, 1, 8)],
}
COMMON = ("Qwen2.5-0.5B", "Qwen2.5-7B", "Qwen2.5-72B", "Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-8B")
"""The smallest model of each family, and models with other numbers of heads; the others differ from one of them in
size."""
CASES = [
    pytest.param(name, layout, marks=[] if name in COMMON else [FULL]) for name in LAYOUTS for layout in LAYOUTS[name]
]
STAGED = [("Qwen2.5-7B", (4, 4, 7, 2)), ("Qwen2.5-72B", (8, 4, 1, 8)), ("Qwen3-1.7B", (2, 2, 7, 2))]


@cache
def plan_of(name: str, layout: tuple[int, int, int, int]) -> ReshardPlan:
    tensor, pipeline, virtual, engine = layout
    return ReshardPlan(QWEN[name], ParallelLayout(tensor=tensor, pipeline=pipeline, virtual=virtual), engine)


def vllm_rows(shape: ModelShape, hf_name: str, rank: int, size: int) -> np.ndarray | None:
    """Indices along the split dimension that vLLM's rank holds, by its rules for heads; None: all of them."""
    head, heads = shape.head_dim, shape.num_heads // size
    if "q_proj" in hf_name or "o_proj" in hf_name:
        return np.arange(rank * heads * head, (rank + 1) * heads * head)
    if "k_proj" in hf_name or "v_proj" in hf_name:
        # Each query head needs the key and value head of its group, and no other is there.
        group = shape.num_heads // shape.num_kv_heads
        kv = sorted({query // group for query in range(rank * heads, (rank + 1) * heads)})
        return np.concatenate([np.arange(k * head, (k + 1) * head) for k in kv])
    if "mlp." in hf_name:
        return np.arange(rank * shape.ffn_size // size, (rank + 1) * shape.ffn_size // size)
    if "embed_tokens" in hf_name or "lm_head" in hf_name:
        rows = np.array_split(np.arange(-(-shape.vocab_size // 64) * 64), size)[rank]
        return rows[rows < shape.vocab_size]
    return None


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_element_that_an_engine_rank_needs_is_sent_to_it_exactly_once(name, layout):
    plan = plan_of(name, layout)
    for engine_rank in range(plan.engine_tensor):
        received: dict[str, list[TensorSlice]] = {}
        for bucket in plan.buckets:
            for transfer in plan.transfers(bucket):
                if transfer.engine_rank == engine_rank:
                    for part in transfer.slices:
                        received.setdefault(part.hf_name, []).append(part)
        assert set(received) == set(plan.table.hf_shapes)
        for hf_name, slices in received.items():
            assert_they_cover_once(slices, plan, hf_name, engine_rank)


def assert_they_cover_once(slices: list[TensorSlice], plan: ReshardPlan, hf_name: str, engine_rank: int) -> None:
    """The slices of a tensor lie side by side along one dimension and hold what the rank needs, each index once."""
    hf_shape = plan.table.hf_shapes[hf_name]
    split = 1 if "o_proj" in hf_name or "down_proj" in hf_name else 0
    for part in slices:
        across = [extent for axis, extent in enumerate(part.hf_slices()) if axis != split]
        assert across == [slice(0, length) for axis, length in enumerate(hf_shape) if axis != split]
    extents = [part.hf_slices()[split] for part in slices]
    held = np.sort(np.concatenate([np.arange(extent.start, extent.stop) for extent in extents]))
    needed = vllm_rows(plan.shape, hf_name, engine_rank, plan.engine_tensor)
    assert np.array_equal(held, np.arange(hf_shape[split]) if needed is None else needed)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_slices_lie_within_the_senders_parameter_and_no_buffer_is_above_the_bound(name, layout):
    plan = plan_of(name, layout)
    for bucket in plan.buckets:
        shapes = plan.hf_shapes(bucket)
        assert sum(map(prod, shapes.values())) <= plan.largest_bucket
        for transfer in plan.transfers(bucket):
            assert transfer.elements <= plan.largest_bucket
            for part in transfer.slices:
                parameter = plan.table.parameters[part.parameter]
                local = torch.empty(parameter.local_shape(plan.layout.tensor), device="meta")
                whole = torch.empty(shapes[part.hf_name], device="meta")
                assert local[part.local_slices()].shape == whole[part.hf_slices()].shape == part.size


def test_the_bound_is_the_embedding_of_the_largest_model():
    plan = plan_of("Qwen2.5-72B", (8, 4, 1, 8))
    assert plan.largest_bucket == 152064 * 8192 + 8192
    assert (plan.largest_bucket - 8192) * 2 == 2376 * 2**20


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_each_bucket_is_there_once_and_stages_take_turns(name, layout):
    plan = plan_of(name, layout)
    order = interleaved(plan)
    assert sorted(order) == list(plan.buckets)
    assert {plan.pipeline_stage(bucket) for bucket in plan.buckets} == set(range(plan.layout.pipeline))
    first = order[: plan.layout.pipeline * plan.layout.virtual]
    assert {plan.pipeline_stage(bucket) for bucket in first} == set(range(plan.layout.pipeline))


@pytest.mark.parametrize(("name", "layout"), STAGED)
def test_a_ranks_staging_block_is_no_larger_than_its_share_of_the_largest_bucket(name, layout):
    plan = plan_of(name, layout)
    for stage in range(plan.layout.pipeline):
        for tensor in range(plan.layout.tensor):
            assert staging_elements(plan, stage, tensor) <= 1.001 * plan.largest_bucket / plan.layout.tensor


@pytest.mark.parametrize(("name", "layout"), STAGED)
def test_buckets_under_way_together_are_no_larger_than_the_largest(name, layout):
    plan = plan_of(name, layout)
    under_way: list[int] = []
    for bucket, is_begin in begins_and_ends(plan):
        if is_begin:
            under_way.append(bucket)
            assert len(under_way) == 1 or sum(map(plan.elements, under_way)) <= plan.largest_bucket
        else:
            assert under_way.pop(0) == bucket
    assert under_way == []


@given(st.lists(st.one_of(st.integers(1, 1000), st.none()), max_size=60), st.randoms(use_true_random=False))
def test_parts_of_an_arena_never_overlap(steps, random):
    allocator, parts = BlockAllocator(), {}
    for elements in steps:
        if elements is None and parts:
            begin = random.choice(sorted(parts))
            allocator.give_back(begin)
            del parts[begin]
        elif elements is not None:
            begin = allocator.take(elements)
            assert all(end <= begin or begin + elements <= other for other, end in parts.items())
            parts[begin] = begin + elements
    assert allocator.end >= max(parts.values(), default=0)


def test_where_both_sides_split_alike_an_engine_rank_receives_from_one_rank_only():
    for name, layout in [("Qwen2.5-72B", (8, 4, 1, 8)), ("Qwen2.5-7B", (4, 2, 1, 4)), ("Qwen3-1.7B", (2, 2, 7, 2))]:
        plan = plan_of(name, layout)
        for bucket in plan.buckets:
            assert all(transfer.trainer_rank == transfer.engine_rank for transfer in plan.transfers(bucket))


def test_a_rank_that_has_padding_alone_gets_nothing_of_the_vocabulary():
    shape = ModelShape("qwen3", 8, 1, 4, 4, 2, 8, 100, True, 1e6, 1e-6, 64)
    parts = [engine_slices(shape, "model.embed_tokens.weight", (100, 8), rank, 4) for rank in range(4)]
    assert parts == [(slice(*rows), slice(0, 8)) for rows in ((0, 32), (32, 64), (64, 96), (96, 100))]
    shape = ModelShape("qwen3", 8, 1, 4, 4, 2, 8, 65, True, 1e6, 1e-6, 64)
    parts = [engine_slices(shape, "lm_head.weight", (65, 8), rank, 4) for rank in range(4)]
    assert parts == [(slice(*rows), slice(0, 8)) for rows in ((0, 32), (32, 64), (64, 65), (65, 65))]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("module", ["plan", "types"])
def test_plan_and_types_load_nothing_heavy(module):
    code = f"import sys, meds_megatron.weights.resharding.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "ray", "megatron", "vllm"} & set(done.stdout.split())
