"""What a user gets wrong: one clear sentence each, before anything is started or written."""

import json
import shutil

import pytest

from meds_megatron.cli import main

SHAPE = dict(
    model_type="qwen3",
    transformers_version="5.19.0",
    architectures=["Qwen3ForCausalLM"],
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=96,
    vocab_size=151936,
    tie_word_embeddings=True,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
)
GOOD_ROW = {"question": "What is 1 + 1?", "answer": "2"}


@pytest.fixture
def model_dir(tmp_path, shared_data):
    """A model directory as far as anything looks at it before the ranks load weights."""
    directory = tmp_path / "model"
    shutil.copytree(shared_data / "qwen2-tokenizer", directory)
    (directory / "config.json").write_text(json.dumps(SHAPE))
    return directory


@pytest.fixture
def refused(tmp_path, model_dir, capsys):
    """Runs `meds train` with the given settings and returns the one line it is refused with."""

    def run(rows: str | None = None, **settings: object) -> str:
        problems = tmp_path / "problems.jsonl"
        problems.write_text(json.dumps(GOOD_ROW) + "\n" if rows is None else rows)
        settings = {
            "run_dir": tmp_path / "run",
            "model.make": "no",
            "model.path": model_dir,
            "data.train": f"[{problems}]",
            "data.validation": "[]",
            "rollout.max_prompt_tokens": 200,
        } | settings
        arguments = ["train", "configs/quickstart.yaml", *(f"{key}={value}" for key, value in settings.items())]
        assert main(arguments) == 2
        shown = capsys.readouterr().err.strip()
        assert len(shown.splitlines()) == 1 and shown.startswith("meds: ")
        assert not (tmp_path / "run").exists()
        return shown

    return run


def test_missing_model_directory(refused):
    assert "/no/such/model does not exist" in refused(**{"model.path": "/no/such/model"})


def test_unsupported_architecture(refused, model_dir):
    (model_dir / "config.json").write_text(json.dumps(SHAPE | {"architectures": ["LlamaForCausalLM"]}))
    assert "LlamaForCausalLM: only Qwen2ForCausalLM and Qwen3ForCausalLM" in refused()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"parallel.pipeline": 3, "cluster.ranks_per_node": 3},
            "4 layers cannot be divided over parallel.pipeline = 3",
        ),
        ({"parallel.tensor": 4, "cluster.ranks_per_node": 8}, "2 key/value heads cannot be divided over"),
        ({"parallel.virtual_pipeline": 4}, "parallel.virtual_pipeline = 4"),
        ({"cluster.ranks_per_node": 3}, "make the number of ranks a multiple of 2"),
        ({"train.micro_batch_responses": 500}, "is smaller than train.micro_batch_responses"),
    ],
)
def test_layout_that_does_not_divide(refused, settings, expected):
    assert expected in refused(**settings)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (json.dumps(GOOD_ROW) + "\n{not json\n", "problems.jsonl, row 2"),
        (json.dumps({"question": "?", "answer": ""}) + "\n", "answer"),
        (json.dumps({"answer": "3"}) + "\n", "problems.jsonl, row 1"),
        (json.dumps({"question": "?", "answer": ["3"]}) + "\n", "problems.jsonl, row 1"),
    ],
    ids=["not JSON", "empty answer", "no question", "answer of a wrong type"],
)
def test_malformed_jsonl_row(refused, rows, expected):
    assert expected in refused(rows)


def test_parquet_that_is_none(refused, tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 but not really")
    assert "broken.parquet" in refused(**{"data.train": f"[{path}]"})


def test_prompt_longer_than_the_limit(refused):
    long_row = json.dumps({"question": "one " * 500, "answer": "1"}) + "\n"
    assert "rollout.max_prompt_tokens" in refused(long_row)
    message = refused(json.dumps(GOOD_ROW) + "\n" + long_row, **{"data.overlong_prompts": "error"})
    assert "problems:2" in message and "rollout.max_prompt_tokens is 200" in message
