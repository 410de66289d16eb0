"""Bytes of weights, gradients and optimizer state against megatron-core's own tensors."""

import pytest

from meds_megatron.config import QWEN, ParallelConfig, ParallelLayout
from meds_megatron.plan.sizes import ITEM_BYTES, rank_sizes
from tests.model import qwen_cases
from tests.pairwise import in_turn
from tests.plan import meta_rank
from tests.tiers import FULL

MODELS = [
    "Qwen2.5-0.5B",
    "Qwen2.5-Math-7B",
    "Qwen2.5-32B",
    "Qwen2.5-72B",
    "Qwen3-1.7B",
    "Qwen3-8B",
    "Qwen3-32B",
]
"""Models of configs/, and the smallest."""
COMMON = ["Qwen2.5-0.5B", "Qwen3-32B"]
"""One with tied embeddings, biases and few heads, and a large one without; the others are like one of them."""
LAYOUTS = [
    dict(data=4),
    dict(tensor=2, data=3, sequence=True),
    dict(pipeline=3, data=2),
    dict(tensor=2, context=3, data=2),
    dict(tensor=2, pipeline=4, virtual_pipeline=2, data=2),
    dict(tensor=8, pipeline=4, virtual_pipeline=2, data=2, sequence=True),
]
"""The 0.5B model has heads for two tensor ranks; the others take the last layout as well."""


SMALL_LAYOUTS = {
    "DP3": dict(data=3),
    "TP2xDP2": dict(tensor=2, data=2),
    "PP2xDP2": dict(pipeline=2, data=2),
    "PP3": dict(pipeline=3),
    "CP2": dict(context=2),
}


def layouts_of(model: str) -> list[dict]:
    return LAYOUTS[:-1] if QWEN[model].num_kv_heads < 8 else LAYOUTS


def parts(layout: dict) -> tuple[ParallelConfig, ParallelLayout]:
    data = layout["data"]
    parallel = ParallelConfig(**{name: value for name, value in layout.items() if name != "data"})
    return parallel, ParallelLayout.of(parallel, data)


@pytest.mark.parametrize("model", [pytest.param(model, marks=[] if model in COMMON else [FULL]) for model in MODELS])
def test_a_ranks_bytes_are_those_of_megatron_on_the_meta_device(cpu_ranks, model):
    shape, cases, expected = QWEN[model], [], []
    for settings in layouts_of(model):
        parallel, layout = parts(settings)
        for stage in range(layout.pipeline):
            for data, context in {(0, 0), (layout.data - 1, layout.context - 1)}:
                rank = layout.rank(layout.tensor - 1, context, data, stage)
                for dtype in ("bfloat16", "float32"):
                    cases.append((shape, parallel, layout.ranks, rank, dtype))
                    sizes = rank_sizes(shape, layout, stage, context + layout.context * data)
                    expected.append(
                        meta_rank.Bytes(
                            parameters=sizes.parameters * ITEM_BYTES[dtype],
                            weights=sizes.weight_bytes(dtype),
                            gradients=sizes.gradient_bytes,
                            optimizer=sizes.optimizer_bytes(dtype),
                        )
                    )
    (found,) = cpu_ranks.run(1, meta_rank.rank_bytes, cases)
    assert found == expected


@pytest.mark.parametrize(
    ("layout_name", "model"),
    in_turn(SMALL_LAYOUTS, ["qwen2 untied", "qwen3 tied"]),
)
def test_a_small_models_bytes_are_those_of_real_ranks_with_their_padding(
    cpu_ranks, tmp_path_factory, model, layout_name
):
    from meds_megatron.config import ModelShape

    settings = SMALL_LAYOUTS[layout_name]
    directory = qwen_cases.cached_model(tmp_path_factory, model)
    _, layout = parts({"data": 1} | settings)
    shape = ModelShape.from_hf(directory)
    found = cpu_ranks.run(layout.ranks, real_bytes, str(directory), {k: v for k, v in settings.items() if k != "data"})
    for rank, bytes_of_rank in enumerate(found):
        where = layout.coordinates(rank)
        sizes = rank_sizes(shape, layout, where.pipeline, where.context + layout.context * where.data)
        assert bytes_of_rank == (
            sizes.weight_bytes("float32"),
            sizes.gradient_bytes,
            sizes.optimizer_bytes("float32"),
        )
    padded = [rank_sizes(shape, layout, stage) for stage in range(layout.pipeline)]
    assert model == "qwen2 untied" or any(sizes.buffer > sizes.parameters for sizes in padded)


def real_bytes(_rank: int, directory: str, parallel: dict) -> tuple[int, int, int]:
    policy = qwen_cases.make_policy(directory, parallel)
    buffers = [buffer for chunk in policy._wrapped for buffer in chunk.buffers]
    for buffer in buffers:
        buffer.grad_data.normal_()
    policy.optimizer.step()
    state = [s for part in policy.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    return (
        sum(buffer.param_data.nbytes for buffer in buffers),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        sum(value.nbytes for values in state for name, value in values.items() if name.startswith("exp_avg")),
    )
