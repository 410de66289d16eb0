"""The benchmark of overlap on a small model, and a setting that no run takes."""

import pytest

from meds_megatron.bench.overlap import run
from meds_megatron.errors import UserError


def test_both_runs_are_measured(run_meds, cpu_engines, small_model, tmp_path):
    overrides = ["model.make=no", f"model.path={small_model}", "data.limit_train=8", "data.limit_validation=4"]
    overrides += ["filter.metric=none", "rollout.responses_per_prompt=4", "reward.overlong.buffer=38"]
    overrides += ["train.prompts_per_step=4", "train.mini_batch_prompts=4", "cluster.device=cpu"]
    found = run(steps=3, seeds=1, max_staleness=1, overrides=overrides, directory=str(tmp_path))
    (sync,), (overlap,) = found["seconds"]["sync"], found["seconds"]["overlap"]
    assert found["ratio"] == pytest.approx(overlap / sync) and found["staleness"] > 0
    assert all(0 <= found["accuracy"][name][0] <= 1 and 0 < found["waiting"][name][0] < 1 for name in found["accuracy"])
    assert {path.name for path in tmp_path.iterdir()} == {"sync0", "overlap0"}


@pytest.mark.usefixtures("processes")
def test_a_run_that_fails_is_named_with_its_error():
    with pytest.raises(UserError, match=r"train\.stepz"):
        run(steps=1, seeds=1, max_staleness=1, overrides=["train.stepz=1"])
