import json
import subprocess
import sys

import pytest

from meds_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, validate_model
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError

QWEN2_5_MATH_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 4096,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def write(directory, **changes):
    raw = {key: value for key, value in (QWEN2_5_MATH_7B | changes).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_sizes_are_read_from_a_transformers_4_config(tmp_path):
    assert ModelShape.from_hf(write(tmp_path)) == ModelShape(
        architecture="qwen2",
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        ffn_size=18944,
        vocab_size=152064,
        tie_embeddings=False,
        rope_theta=10000.0,
        norm_eps=1e-6,
        max_positions=4096,
    )


def test_rope_theta_of_a_transformers_5_config_is_not_lost(tmp_path):
    rope = {"rope_theta": 1e6, "rope_type": "default"}
    assert ModelShape.from_hf(write(tmp_path, rope_theta=..., rope_parameters=rope)).rope_theta == 1e6


def test_a_head_dimension_of_its_own_wins(tmp_path):
    raw = dict(architectures=["Qwen3ForCausalLM"], head_dim=128, hidden_size=1024, num_attention_heads=16)
    shape = ModelShape.from_hf(write(tmp_path, **raw, tie_word_embeddings=True))
    assert (shape.architecture, shape.head_dim, shape.tie_embeddings) == ("qwen3", 128, True)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(architectures=["LlamaForCausalLM"]), "describes LlamaForCausalLM: only Qwen2ForCausalLM and"),
        (dict(architectures=...), "describes no architecture"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_parameters"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(hidden_size=...), "has no key 'hidden_size'"),
        (dict(rope_theta=...), "has no key 'rope_theta'"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(tmp_path, changes, expected):
    with pytest.raises(UserError) as caught:
        ModelShape.from_hf(write(tmp_path, **changes))
    assert expected in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_is_not_a_model_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: give model\.path"):
        ModelShape.from_hf(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        ModelShape.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        ModelShape.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        ModelShape.from_hf(tmp_path)


def test_a_config_is_validated_against_a_shape(tmp_path):
    shape = ModelShape.from_hf(write(tmp_path))
    config = Config(model=ModelConfig(path=str(tmp_path)), data=DataConfig(train=["train.jsonl"]))
    validate_model(config, shape)
    config.parallel = ParallelConfig(tensor=8)
    with pytest.raises(UserError, match="28 attention heads"):
        validate_model(config, shape)


@pytest.mark.usefixtures("processes")
def test_reading_a_shape_needs_no_torch():
    code = "import sys, meds_megatron.config.model_shape; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
