"""The reshard benchmark at a small shape: the bytes that it counts are those of the plan."""

from dataclasses import replace

import pytest

from meds_megatron.bench.reshard import Ranks
from meds_megatron.bench.reshard_forecast import gathered_bytes
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.weights.resharding.types import SyncSpec


@pytest.mark.usefixtures("processes")
def test_bytes_are_counted_as_the_plan_has_them(tmp_path):
    shape = replace(
        QWEN["Qwen2.5-0.5B"], hidden_size=64, num_layers=4, num_heads=4, head_dim=16, ffn_size=96, vocab_size=640
    )
    spec = SyncSpec(shape, ParallelLayout(tensor=2, pipeline=2), 2, "bfloat16", str(tmp_path))
    plan, result = spec.plan(), Ranks(spec).measure(rounds=2)
    assert result["bytes_aligned"] == 2 * sum(plan.elements(bucket) for bucket in plan.buckets)
    assert result["bytes_gather"] == gathered_bytes(plan, engines=1, item_bytes=2)
    assert result["bytes_gather"] > 2 * result["bytes_aligned"]
    assert min(result[name] for name in ("aligned_s", "gather_s", "memory_s", "copy_bound_s", "speedup")) > 0
