"""Checkpoints of megatron-core from Hugging Face directories and back, bit for bit, against real ranks."""

import json

import pytest
import torch

from meds_megatron.weights.conversion.convert import to_hf, to_mcore
from tests.weights.conversion import checkpoint_ranks
from tests.weights.hf_cases import MODELS, make_source, tensors_in, unequal
from tests.weights.round_trip import Case

LAYOUTS = {
    "TP2": dict(tensor=2),
    "PP2": dict(pipeline=2),
    "TP2xPP2xVPP2": dict(tensor=2, pipeline=2, virtual_pipeline=2),
}
SAVED = {
    "TP1": {},
    "TP4": dict(tensor=4),
    "TP2xPP2": dict(tensor=2, pipeline=2),
    "PP3": dict(pipeline=3),
    "TP2xPP2xVPP2 uneven": dict(tensor=2, pipeline=2, virtual_pipeline=2, last_stage_layers=2),
}


def ranks_of(parallel):
    return parallel.get("tensor", 1) * parallel.get("pipeline", 1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    out = tmp_path_factory.mktemp("sources")
    return {name: make_source(out / name.replace(" ", "-"), name) for name in MODELS}


@pytest.fixture(scope="module")
def checkpoints(sources, tmp_path_factory):
    """Made from the sources, with parameters split into chunks of a few rows."""
    out = tmp_path_factory.mktemp("checkpoints")
    for source in sources.values():
        to_mcore(source, out / source.name, chunk_bytes=3000)
    return {name: out / source.name for name, source in sources.items()}


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_bit_for_bit(sources, checkpoints, model, tmp_path):
    to_hf(checkpoints[model], tmp_path / "back")
    assert unequal(tensors_in(sources[model]), tensors_in(tmp_path / "back")) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_any_layout_load_the_checkpoint(cpu_ranks, sources, checkpoints, layout):
    parallel = LAYOUTS[layout]
    cases = [Case(sources[model], checkpoints[model], parallel) for model in MODELS]
    found = cpu_ranks.run(ranks_of(parallel), checkpoint_ranks.differences, cases)
    assert found == [[]] * ranks_of(parallel)


@pytest.mark.parametrize("layout", SAVED)
def test_what_ranks_saved_converts_with_its_padding_cut_off(cpu_ranks, sources, tmp_path, layout):
    parallel = SAVED[layout]
    cases = [Case(sources[model], tmp_path / model.replace(" ", "-"), parallel) for model in MODELS]
    cpu_ranks.run(ranks_of(parallel), checkpoint_ranks.save, cases)
    for case in cases:
        back = tmp_path / f"{case.target.name}-back"
        to_hf(case.target, back)
        assert unequal(tensors_in(case.source), tensors_in(back)) == []


def test_a_checkpoint_keeps_the_models_files_as_they_are(sources, checkpoints):
    source, checkpoint = sources["qwen2 tied"], checkpoints["qwen2 tied"]
    kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all((checkpoint / name).read_bytes() == (source / name).read_bytes() for name in kept)
    assert not (checkpoint / "trainer_state.json").exists()


def test_the_export_of_a_checkpoint_is_a_plain_hugging_face_directory(sources, checkpoints, tmp_path):
    from transformers import AutoModelForCausalLM

    source, target = sources["qwen3 untied"], tmp_path / "back"
    to_hf(checkpoints["qwen3 untied"], target, max_file_bytes=30_000)
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".safetensors") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert (target / "config.json").read_bytes() == (source / "config.json").read_bytes()
    tokens = torch.arange(20)[None]
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (target, source)]
    assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)


def test_dtype_of_the_export(sources, checkpoints, tmp_path):
    to_hf(checkpoints["qwen2 tied"], tmp_path / "bf16", torch.bfloat16)
    before = {name: tensor.bfloat16() for name, tensor in tensors_in(sources["qwen2 tied"]).items()}
    assert unequal(before, tensors_in(tmp_path / "bf16")) == []
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    to_mcore(tmp_path / "bf16", tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert unequal(before, tensors_in(tmp_path / "again")) == []
