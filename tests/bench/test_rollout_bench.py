from meds_megatron.rollout import bench
from tests.rollout.engine_cases import PROMPTS, engine_config, make_model


def test_the_benchmark_runs_both_engines(ray_cluster, tmp_path):
    config = engine_config(engines=2)
    config.rollout.responses_per_prompt, config.rollout.max_response_tokens = 2, 20
    result = bench.run(config, str(make_model(tmp_path, "qwen3 tied", seed=0)), PROMPTS, use_gpu=False, rounds=1)
    assert (result["prompts"], result["responses"], result["rounds"]) == (5, 10, 1)
    assert result["ratio"] == result["ours_tokens_per_s"] / result["plain_tokens_per_s"]
    assert 0 < result["mean_tokens"] <= 20
    assert config.rollout.engines == 2
