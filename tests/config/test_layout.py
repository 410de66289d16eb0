from dataclasses import replace
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meds_megatron.config import QWEN, ClusterConfig, Config, ParallelConfig, ParallelLayout
from meds_megatron.errors import UserError

MODEL = QWEN["Qwen2.5-7B"]


def test_data_parallel_size_is_what_tensor_context_and_pipeline_leave():
    config = Config(cluster=ClusterConfig(nodes=4), parallel=ParallelConfig(tensor=4, pipeline=2, virtual_pipeline=2))
    assert ParallelLayout.from_config(config) == ParallelLayout(tensor=4, pipeline=2, virtual=2, data=4)
    config.parallel.context = 2
    assert ParallelLayout.from_config(config) == ParallelLayout(tensor=4, pipeline=2, virtual=2, data=2, context=2)


def test_ranks_that_do_not_divide_are_refused():
    config = Config(cluster=ClusterConfig(ranks_per_node=6), parallel=ParallelConfig(tensor=2, pipeline=2))
    with pytest.raises(UserError, match="make the number of ranks a multiple of 4"):
        ParallelLayout.from_config(config)


def test_rank_order_is_tensor_then_context_then_data_then_pipeline():
    layout = ParallelLayout(tensor=2, context=2, data=3, pipeline=2)
    found = [layout.coordinates(rank) for rank in (0, 1, 2, 4, 12)]
    assert found == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert [layout.rank(*layout.coordinates(rank)) for rank in range(layout.ranks)] == list(range(24))


def test_chunks_interleave_over_the_stages():
    layout = ParallelLayout(pipeline=2, virtual=2)
    assert [layout.layers_of(stage, chunk, 8) for chunk, stage in product(range(2), range(2))] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert layout.layers_of(1, 0, 8) == [2, 3]


def test_first_and_last_stage_can_have_sizes_of_their_own():
    layout = ParallelLayout(pipeline=4, first_stage_layers=19, last_stage_layers=19)
    assert layout.stage_sizes(80) == [19, 21, 21, 19]
    assert layout.layers_of(3, 0, 80) == list(range(61, 80))
    assert ParallelLayout(pipeline=2, last_stage_layers=3).stage_sizes(8) == [5, 3]
    assert ParallelLayout(pipeline=2, first_stage_layers=2, last_stage_layers=4, virtual=2).layers_of(1, 1, 6) == [4, 5]


@given(
    pipeline=st.integers(1, 6),
    virtual=st.integers(1, 4),
    chunk_layers=st.integers(1, 4),
    first=st.none() | st.integers(1, 4),
    last=st.none() | st.integers(1, 4),
)
def test_every_layer_is_on_exactly_one_chunk_in_order(pipeline, virtual, chunk_layers, first, last):
    if pipeline == 1:
        first = last = None
    sizes = [chunk_layers] * pipeline
    sizes[0], sizes[-1] = first or sizes[0], last or sizes[-1]
    num_layers = sum(sizes) * virtual
    ends = {"first_stage_layers": first and first * virtual, "last_stage_layers": last and last * virtual}
    layout = ParallelLayout(pipeline=pipeline, virtual=virtual, **ends)
    order = [layer for c in range(virtual) for s in range(pipeline) for layer in layout.layers_of(s, c, num_layers)]
    assert order == list(range(num_layers))


@given(pipeline=st.integers(1, 8), virtual=st.integers(1, 3), num_layers=st.integers(1, 80))
def test_stages_and_chunks_are_as_equal_as_they_can_be(pipeline, virtual, num_layers):
    assume(num_layers >= pipeline * virtual)
    layout = ParallelLayout(pipeline=pipeline, virtual=virtual)
    stages, chunks = layout.stage_sizes(num_layers), layout.chunk_sizes(num_layers)
    assert sum(stages) == sum(map(sum, chunks)) == num_layers
    assert max(stages) - min(stages) <= 1
    assert [max(sizes) - min(sizes) <= 1 for sizes in zip(*chunks, strict=True)] == [True] * pipeline
    assert min(map(min, chunks)) >= 1
    assert stages[-1] == min(stages)


def test_the_stages_at_the_ends_have_fewer_layers():
    assert ParallelLayout(pipeline=8).stage_sizes(28) == [3, 3, 3, 4, 4, 4, 4, 3]
    assert ParallelLayout(pipeline=6).stage_sizes(80) == [13, 13, 13, 14, 14, 13]
    assert ParallelLayout(pipeline=4, first_stage_layers=5).stage_sizes(28) == [5, 8, 8, 7]
    assert ParallelLayout(pipeline=3, virtual=2).chunk_sizes(7) == [[1, 2, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    ("layout", "num_layers"),
    [
        (dict(pipeline=4), 28),
        (dict(pipeline=8), 28),
        (dict(pipeline=6), 80),
        (dict(pipeline=2, virtual=7), 28),
        (dict(pipeline=3, virtual=2), 80),
        (dict(pipeline=4, virtual=2, first_stage_layers=6, last_stage_layers=2), 24),
        (dict(pipeline=4, virtual=2, first_stage_layers=5), 24),
    ],
)
def test_layers_agree_with_megatron_core(layout, num_layers, monkeypatch):
    pytest.importorskip("megatron.core")
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from meds_megatron.model.gpt import pipeline_layout

    ours = ParallelLayout(**layout)
    virtual = ours.virtual if ours.virtual > 1 else None
    theirs = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_dtype="float32",
        pipeline_model_parallel_size=ours.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=pipeline_layout(ours, num_layers),
    )
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", virtual)
    for stage, chunk in product(range(ours.pipeline), range(ours.virtual)):
        monkeypatch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", stage)
        chunk_layers = ours.layers_of(stage, chunk, num_layers)
        vp_stage = chunk if ours.virtual > 1 else None
        assert chunk_layers[0] == get_transformer_layer_offset(theirs, vp_stage)
        assert len(chunk_layers) == get_num_layers_to_build(theirs, vp_stage)


@pytest.mark.parametrize(
    ("layout", "sizes", "expected"),
    [
        (dict(tensor=8), {}, "28 attention heads cannot be divided over parallel.tensor = 8"),
        (dict(tensor=7), {}, "4 key/value heads cannot be divided over parallel.tensor = 7 ranks; choose"),
        (dict(tensor=4), dict(ffn_size=18), "18 feed-forward columns"),
        (dict(pipeline=8, virtual=4), {}, "28 layers are fewer than the model chunks of .* = 8 x 4"),
        (dict(pipeline=2, virtual=4, first_stage_layers=3), {}, r"stages of \[3, 25\] layers .* = 4 model chunks"),
        (dict(pipeline=4, first_stage_layers=26), {}, "2 of the model's 28 layers are left for 3 pipeline stages"),
        (dict(pipeline=2, first_stage_layers=28), {}, "0 of the model's 28 layers are left for 1"),
        (dict(pipeline=2, first_stage_layers=9, last_stage_layers=9), {}, "10 of the model's 28 layers are left for 0"),
        (dict(first_stage_layers=28), {}, "need parallel.pipeline > 1"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(layout, sizes, expected):
    with pytest.raises(UserError, match=expected) as caught:
        ParallelLayout(**layout).check_model(replace(MODEL, **sizes))
    assert "\n" not in str(caught.value)


def test_a_model_that_divides_is_accepted():
    ParallelLayout(tensor=4, pipeline=4, virtual=7, data=2).check_model(MODEL)
