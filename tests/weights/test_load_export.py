"""Hugging Face -> Megatron -> Hugging Face on real ranks: bit for bit, at every layout."""

import json

import pytest
import torch
from safetensors.torch import save_file

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.table import build_table
from tests.weights import round_trip
from tests.weights.hf_cases import LAYERS, MODELS, make_source, tensors_in, unequal
from tests.weights.round_trip import Case

LAYOUTS = {
    "TP1": {},
    "TP2": dict(tensor=2),
    "PP2xDP2": dict(pipeline=2),
    "TP4": dict(tensor=4),
    "PP2": dict(pipeline=2),
    "PP4": dict(pipeline=4),
    "PP2xVPP2": dict(pipeline=2, virtual_pipeline=2),
    "PP4xVPP2": dict(pipeline=4, virtual_pipeline=2),
    "TP2xPP2": dict(tensor=2, pipeline=2),
    "TP2xPP2xVPP2": dict(tensor=2, pipeline=2, virtual_pipeline=2),
    "TP2xPP4": dict(tensor=2, pipeline=4),
    "TP2xPP4xVPP2": dict(tensor=2, pipeline=4, virtual_pipeline=2),
    "TP4xPP2": dict(tensor=4, pipeline=2),
    "TP4xPP2xVPP2": dict(tensor=4, pipeline=2, virtual_pipeline=2),
    "TP4xPP4": dict(tensor=4, pipeline=4),
    "TP4xPP4xVPP2": dict(tensor=4, pipeline=4, virtual_pipeline=2),
    "PP3": dict(pipeline=3),
    "PP3xVPP2": dict(pipeline=3, virtual_pipeline=2),
    "PP2 uneven": dict(pipeline=2, first_stage_layers=5),
    "PP4 uneven": dict(pipeline=4, first_stage_layers=1, last_stage_layers=3),
    "TP2xPP2xVPP2 uneven": dict(tensor=2, pipeline=2, virtual_pipeline=2, last_stage_layers=2),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    directories = {}
    for name in MODELS:
        directories[name] = tmp_path_factory.mktemp("sources") / name.replace(" ", "-")
        make_source(directories[name], name)
    return directories


def ranks_of(layout):
    """Ranks of one model replica, or two of them where the name says so."""
    parallel = LAYOUTS[layout]
    return parallel.get("tensor", 1) * parallel.get("pipeline", 1) * (2 if "DP2" in layout else 1)


@pytest.fixture(scope="module")
def exported(ranks, sources, tmp_path_factory):
    """All models at all layouts: directory by (model, layout), and the layers of each rank by layout."""
    out = tmp_path_factory.mktemp("exported")
    directories, layers = {}, {}
    for layout, parallel in LAYOUTS.items():
        cases = [Case(sources[model], out / f"{model} {layout}".replace(" ", "-"), parallel) for model in MODELS]
        layers[layout] = ranks.run(ranks_of(layout), round_trip.round_trips, cases)
        directories |= {(model, layout): case.target for model, case in zip(MODELS, cases, strict=True)}
    return directories, layers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_weights_come_back_bit_for_bit(exported, sources, model, layout):
    target = exported[0][model, layout]
    assert unequal(tensors_in(sources[model]), tensors_in(target)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_rule_is_megatrons(exported, layout):
    parallel = LAYOUTS[layout]
    names = {"virtual_pipeline": "virtual"}
    rule = ParallelLayout(**{names.get(key, key): value for key, value in parallel.items()})
    rule_layers = [[rule.layers_of(s, c, LAYERS) for c in range(rule.virtual)] for s in range(rule.pipeline)]
    ranks = ranks_of(layout)
    assert exported[1][layout] == [rule_layers[rank * rule.pipeline // ranks] for rank in range(ranks)]


def test_the_directory_is_what_transformers_expects(exported, sources):
    from transformers import AutoModelForCausalLM

    target = exported[0]["qwen3 tied", "TP2xPP2"]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_in(target).values())
    assert {path.name for path in target.glob("*.safetensors")} == set(index["weight_map"].values())
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".safetensors") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (target / "config.json").read_bytes() == (sources["qwen3 tied"] / "config.json").read_bytes()
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "eos_token": "<|im_end|>",
        "chat_template": "{{ messages }}",
    }
    tokens = torch.arange(20)[None]
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (target, sources["qwen3 tied"])]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_one_stage_makes_one_file(exported):
    target = exported[0]["qwen2 untied", "TP4"]
    assert [path.name for path in target.glob("model*")] == ["model.safetensors"]


def test_dtype_file_size_and_overwriting(ranks, sources, tmp_path):
    source, target = sources["qwen2 untied"], tmp_path / "bf16"
    options = dict(dtype=torch.bfloat16, max_file_bytes=30_000, overwrite=True)
    target.mkdir()
    (target / "old").write_text("")
    ranks.run(2, round_trip.round_trips, [Case(source, target, dict(tensor=2), "float32", options)])
    before, after = tensors_in(source), tensors_in(target)
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert max(path.stat().st_size for path in target.glob("*.safetensors")) < 33_000
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["bf16"]
    assert not (target / "old").exists()

    again = tmp_path / "again"
    ranks.run(4, round_trip.round_trips, [Case(target, again, dict(tensor=2, pipeline=2), "bfloat16")])
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors_in(again).items())


def test_padded_vocabulary_rows_are_zero_and_on_the_last_rank(ranks, sources, tmp_path):
    found = ranks.run(4, round_trip.padding_rows, Case(sources["qwen3 untied"], tmp_path, dict(tensor=4)))
    assert found == [[(66, False), (66, False)]] * 3 + [[(66, True), (66, True)]]


def test_only_the_first_tensor_rank_gets_tensors(ranks, sources, tmp_path):
    case = Case(sources["qwen2 tied"], tmp_path, dict(tensor=2, pipeline=2))
    found = ranks.run(4, round_trip.tensors_per_bucket, case)
    layers = [12] * 4
    assert found == [[1, *layers], [0] * 5, [*layers, 1], [0] * 5]


def test_loading_needs_little_more_memory_than_the_weights(cpu_ranks, tmp_path):
    sizes = dict(hidden_size=512, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
    names = dict(architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False, rope_theta=1e6)
    config = dict(**sizes, **names, intermediate_size=1024, vocab_size=60_000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = build_table(ModelShape.from_hf(tmp_path)).hf_shapes
    save_file(
        {name: torch.zeros(s, dtype=torch.bfloat16) for name, s in shapes.items()}, tmp_path / "model.safetensors"
    )
    case = Case(tmp_path, tmp_path / "none", dict(tensor=2), "bfloat16")
    for own_bytes, peak_bytes in cpu_ranks.run(2, round_trip.memory_of_loading, case):
        assert own_bytes > 60e6
        assert peak_bytes < 1.3 * own_bytes


def test_a_failed_export_fails_on_all_ranks_and_leaves_nothing(cpu_ranks, sources, tmp_path):
    case = Case(sources["qwen3 untied"], tmp_path / "out", dict(tensor=2, pipeline=2))
    found = cpu_ranks.run(4, round_trip.failing_exports, case)
    assert [existing for existing, _ in found][1:] == [f"the export failed on rank 0: {found[0][0]}"] * 3
    assert found[0][0].endswith("out exists already: choose another directory or remove it")
    assert found[2][1].startswith(f"writing the export {case.target / 'other'} failed: ")
    assert [full for _, full in found[:2]] == [f"the export failed on rank 2: {found[2][1]}"] * 2
