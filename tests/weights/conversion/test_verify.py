"""`meds convert` on the command line, and the differences that verify finds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from meds_megatron.cli import main
from meds_megatron.weights.conversion.verify import verify
from tests.rollout.engine_cases import make_model
from tests.weights.hf_cases import make_source

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "qwen2 untied", seed=0)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "checkpoint"
    assert main(["convert", "to-mcore", str(model), str(out)]) == 0
    return out


@pytest.fixture
def changed(model, tmp_path):
    """Copies the model with its tensors changed by a function, or its config by a dict."""

    def copy(change=lambda tensors: None, **config):
        directory = shutil.copytree(model, tmp_path / "changed")
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(settings | config))
        return directory

    return copy


def nudge(tensors, by=1e-3):
    tensors[NAME][7, 5] += by


def test_a_checkpoint_and_its_export_are_the_model(model, checkpoint, tmp_path, capsys):
    assert main(["convert", "to-hf", str(checkpoint), str(tmp_path / "hf"), "--dtype", "float32"]) == 0
    for a, b in ((model, checkpoint), (checkpoint, tmp_path / "hf"), (model, tmp_path / "hf")):
        assert main(["convert", "verify", str(a), str(b), "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["equal"] and result["first_difference"] is None
        assert result["weights"]["differing"] == result["weights"]["max_abs_difference"] == 0
        assert result["logprobs"]["abs_max"] == 0 and result["logprobs"]["tokens"] > 100


def test_one_differing_element_gives_the_name_of_its_tensor(changed, checkpoint, capsys):
    other = changed(nudge)
    assert main(["convert", "verify", str(checkpoint), str(other), "--weights-only"]) == 1
    shown = capsys.readouterr().out
    assert f"first_difference             {NAME}" in shown
    result = verify(checkpoint, other, text=None)
    assert [row["tensor"] for row in result["differing_tensors"]] == [NAME]
    assert result["differing_tensors"][0]["a"] == result["differing_tensors"][0]["b"] == "float32 [128, 96]"
    assert result["weights"]["max_abs_difference"] == pytest.approx(1e-3, rel=1e-3)
    assert "logprobs" not in result
    assert verify(checkpoint, other, tolerance=2e-3, text=None)["equal"]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors[NAME].view(torch.int32)[0].bitwise_xor_(1),
        lambda tensors: tensors[NAME][3].fill_(torch.nan),
        lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}),
    ],
    ids=["last bit", "not a number", "dtype"],
)
def test_nothing_but_the_same_bits_is_equal(changed, model, change):
    result = verify(model, changed(change), text=None)
    assert result["first_difference"] == NAME and not result["equal"]


def test_the_same_values_in_another_dtype_are_equal_within_a_tolerance(changed, tmp_path):
    rounded = changed(lambda tensors: tensors.update({n: t.bfloat16().float() for n, t in tensors.items()}))
    narrow = tmp_path / "narrow"
    assert main(["convert", "to-mcore", str(rounded), str(tmp_path / "mcore")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "mcore"), str(narrow), "--dtype", "bfloat16"]) == 0
    assert not verify(rounded, narrow, text=None)["equal"]
    result = verify(rounded, narrow, tolerance=0)
    assert result["equal"] and result["logprobs"]["abs_max"] == 0
    assert (result["weights"]["dtypes_a"], result["weights"]["dtypes_b"]) == ("float32", "bfloat16")


def test_another_model_is_another_model(model, tmp_path):
    other = make_source(tmp_path / "other", "qwen3 tied")
    result = verify(model, other, text=None)
    kinds = {row["tensor"]: (row["a"], row["b"]) for row in result["differing_tensors"]}
    assert kinds["model.layers.0.self_attn.q_proj.bias"] == ("float32 [128]", "missing")
    assert result["weights"]["max_abs_difference"] is None and not result["equal"]


def test_equal_weights_under_another_rope_differ_in_log_probs(changed, model):
    config = json.loads((model / "config.json").read_text())
    other = changed(rope_parameters=config["rope_parameters"] | {"rope_theta": 77.0})
    result = verify(model, other)
    assert result["weights"]["differing"] == 0 and result["first_difference"] is None
    assert result["logprobs"]["abs_max"] > 1e-3 and not result["equal"]
    assert verify(model, other, logprob_limit=100.0)["equal"]


def test_a_text_of_ones_own(model, checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("17 + 25 = 42")
    assert main(["convert", "verify", str(model), str(checkpoint), "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["logprobs"]["tokens"] < 20
    text.write_text("")
    assert main(["convert", "verify", str(model), str(checkpoint), "--text", str(text)]) == 2
    assert "the text to compare log-probs on is empty" in capsys.readouterr().err


def test_other_tokens_for_the_same_text(changed, model):
    other = changed()
    tokenizer = (other / "tokenizer.json").read_text()
    vocabulary = json.loads(tokenizer)
    ids = vocabulary["model"]["vocab"]
    ids["1"], ids["2"] = ids["2"], ids["1"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    result = verify(model, other)
    assert not result["equal"] and not result["logprobs"]["same_tokens"] and result["weights"]["differing"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["to-mcore", "nowhere", "out"], "nowhere does not exist"),
        (["to-hf", "nowhere", "out"], "nowhere does not exist"),
        (["verify", "nowhere", "nowhere"], "nowhere does not exist"),
        (["to-hf", "MODEL", "out"], "is not a checkpoint"),
        (["to-mcore", "CHECKPOINT", "out"], "is a checkpoint"),
        (["to-mcore", "MODEL", "CHECKPOINT"], "exists already"),
        (["verify", "BARE", "BARE"], "has no tokenizer that transformers can read"),
    ],
)
def test_a_mistake_is_one_sentence(model, checkpoint, tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BARE").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(model / name, tmp_path / "BARE" / name)
    named = {"MODEL": str(model), "CHECKPOINT": str(checkpoint)}
    assert main(["convert", *(named.get(argument, argument) for argument in arguments)]) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and shown[-1].startswith("meds: ")
    assert not (tmp_path / "out").exists()
