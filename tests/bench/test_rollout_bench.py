import pytest

from meds_megatron.bench import rollout
from tests.rollout.engine_cases import PROMPTS, engine_config, make_model


@pytest.mark.usefixtures("cpu_engines", "shared_ray")
def test_the_benchmark_runs_all_engines(tmp_path):
    config = engine_config(engines=2)
    config.rollout.responses_per_prompt, config.rollout.max_response_tokens, config.rollout.max_num_seqs = 2, 20, 4
    result = rollout.run(config, str(make_model(tmp_path, "qwen3 tied", seed=0)), PROMPTS, use_gpu=False, rounds=1)
    assert (result["prompts"], result["responses"], result["rounds"]) == (5, 10, 1)
    assert result["ratio"] == result["ours_tokens_per_s"] / result["plain_tokens_per_s"]
    assert result["seeded_ratio"] == result["seeded_tokens_per_s"] / result["unseeded_tokens_per_s"]
    assert 0 < result["mean_tokens"] <= 20
    two = result["two_engines"]
    assert two["responses"] == 32 and two["speedup"] == two["static_s"] / two["least_loaded_s"]
    assert config.rollout.engines == 2
