"""Every config of the repository can be run: it loads, it is valid, and the model it names divides over its layout."""

from pathlib import Path

import pytest

from meds_megatron.config import Config, load_config, validate, validate_model
from meds_megatron.config.changes import settings_of
from meds_megatron.config.model_shape import ModelShape

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASELINES = sorted((CONFIGS / "baselines").glob("*.yaml"))
ALL = sorted([*CONFIGS.glob("*.yaml"), *BASELINES])


def qwen(architecture, hidden, layers, heads, kv_heads, ffn, rows, max_positions) -> ModelShape:
    return ModelShape(
        architecture=architecture,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        ffn_size=ffn,
        vocab_size=rows,
        tie_embeddings=hidden <= 2048,
        rope_theta=1e6,
        norm_eps=1e-6,
        max_positions=max_positions,
    )


MODELS = {
    "models/Qwen2.5-Math-7B": qwen("qwen2", 3584, 28, 28, 4, 18944, 152064, 4096),
    "models/Qwen2.5-32B": qwen("qwen2", 5120, 64, 40, 8, 27648, 152064, 131072),
    "models/Qwen2.5-72B": qwen("qwen2", 8192, 80, 64, 8, 29568, 152064, 131072),
    "models/Qwen3-1.7B": qwen("qwen3", 2048, 28, 16, 8, 6144, 151936, 40960),
    "models/Qwen3-8B": qwen("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960),
    "models/Qwen3-32B": qwen("qwen3", 5120, 64, 64, 8, 25600, 151936, 40960),
}


def test_all_models_have_a_config():
    assert set(MODELS) <= {load_config(path).model.path for path in ALL}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_config_loads_and_is_valid(path):
    config = load_config(path)
    validate(config)
    assert config.name == path.stem
    if config.model.path:
        validate_model(config, MODELS[config.model.path])


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_changes_nothing_but_the_method_on_any_base(path):
    base = CONFIGS / "meds_qwen3_8b.yaml"
    changed = differences(load_config(base), load_config(path, [f"base={base}"]))
    method = {key for key in changed if key.split(".")[0] in ("penalty", "filter", "advantage", "policy", "memory")}
    assert changed - method <= {"name", "run_dir", "reward.overlong.enabled"}


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baseline_names_its_loss_and_inherits_no_other(path, tmp_path):
    for loss in ("ppo", "gspo", "cispo"):
        base = tmp_path / f"{loss}.yaml"
        base.write_text(f"base: {CONFIGS / 'quickstart.yaml'}\npolicy:\n  loss: {loss}\n")
        expected = path.stem if path.stem in ("gspo", "cispo") else "ppo"
        assert load_config(path, [f"base={base}"]).policy.loss == expected


def test_the_over_long_penalty_is_off_in_the_grpo_family_alone():
    without = {path.stem for path in BASELINES if not load_config(path).reward.overlong.enabled}
    assert without == {"grpo", "grpo_entropy", "dr_grpo", "gspo", "f_grpo", "historical_counts", "pass_at_k"}


def test_published_models_have_the_published_settings():
    assert load_config(CONFIGS / "meds_qwen3_1.7b.yaml").penalty.alpha == 0.1
    assert load_config(CONFIGS / "meds_qwen3_8b.yaml").penalty.alpha == 0.02
    assert load_config(CONFIGS / "meds_qwen2.5_math_7b.yaml").rollout.max_response_tokens == 3072
    for path in CONFIGS.glob("meds_*.yaml"):
        config = load_config(path)
        assert (config.train.prompts_per_step, config.rollout.responses_per_prompt) == (512, 16)
        assert (config.optimizer.lr, config.policy.clip_low, config.policy.clip_high) == (1e-6, 0.2, 0.28)
        rollout = config.rollout
        assert (rollout.validation_temperature, rollout.validation_top_p, rollout.validation_responses) == (1, 1, 32)
    defaults = Config().rollout
    assert (defaults.validation_temperature, defaults.validation_top_p, defaults.validation_responses) == (1, 1, 1)
    assert Config().data.enable_thinking is None


@pytest.mark.parametrize("base", ["meds_qwen2.5_math_7b", "meds_qwen3_8b"])
def test_the_recommended_setting_has_three_departures_from_the_published_one(base):
    published = load_config(CONFIGS / f"{base}.yaml")
    recommended = load_config(CONFIGS / "meds_recommended.yaml", [f"base={CONFIGS / base}.yaml"])
    validate(recommended)
    assert differences(published, recommended) - {"name", "run_dir"} == {
        "memory.noise",
        "memory.allow_single_cluster",
        "memory.no_answer",
    }


def differences(one: Config, other: Config) -> set[str]:
    """Dotted keys of the settings in which two configs differ."""
    others = settings_of(other)
    return {key for key, value in settings_of(one).items() if value != others[key]}
