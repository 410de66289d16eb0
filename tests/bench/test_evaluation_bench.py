from meds_megatron.bench import evaluation


def test_the_benchmark_runs(cpu_engines, own_ray, small_model):
    result = evaluation.run(responses=2, rounds=1, answers=20, workers=1, problems=8, model=small_model)
    assert (result["responses"], result["answers"], result["rounds"]) == (16, 20, 1)
    assert result["ratio"] == result["eval_tokens_per_s"] / result["plain_tokens_per_s"]
    assert result["unseeded_ratio"] == result["eval_tokens_per_s"] / result["plain_unseeded_tokens_per_s"]
    assert set(result["grading_s"]) == {"math_verify", "strict", "limo"} and 0 < result["mean_tokens"] <= 40
