"""The GSM8K smoke run: real problems, the real Qwen vocabulary, two steps."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.devices import gpu_count
from tests.meds_runs import metrics_of


@pytest.fixture(scope="module")
def run(run_meds, tmp_path_factory, shared_data, engine_device):
    directory = tmp_path_factory.mktemp("smoke") / "run"
    # Two ranks, or one on a machine with one GPU; the engine is on the first one's.
    ranks = 1 if gpu_count() == 1 else 2
    settings = [
        f"cluster.device={engine_device(ranks)}",
        f"cluster.ranks_per_node={ranks}",
        f"parallel.pipeline={ranks}",
        "rollout.kv_cache_gib=1",
        f"run_dir={directory}",
        f"cache_dir={tmp_path_factory.mktemp('cache')}",
        f"model.random.tokenizer={shared_data / 'qwen2-tokenizer'}",
        f"data.train=[{shared_data / 'data' / 'gsm8k_train.jsonl'}]",
        f"data.validation=[{shared_data / 'data' / 'gsm8k_test.jsonl'}]",
    ]
    run_meds.check(run_meds.meds("train", "configs/gsm8k_smoke.yaml", *settings))
    return directory


def test_real_text_passes_through_every_part(run):
    steps = metrics_of(run)
    assert [line["step"] for line in steps] == [0, 1, 2]
    for line in steps[1:]:
        assert line["memory/vectors"] > 0
        assert line["mismatch/logprob_abs_max"] < 1e-3
        assert line["policy/kl_first_update"] < 1e-7
        assert line["grading/error"] == line["grading/timeout"] == 0


def test_answers_in_boxes_have_fingerprints(run):
    rows = pq.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    boxed = [row for row in rows if row["fingerprint"] is not None]
    assert len(boxed) >= 4
    for row in boxed:
        assert "\\boxed{" in row["response"]
        assert len(row["fingerprint"]) == 4 and np.isfinite(row["fingerprint"]).all()
    assert all(row["fingerprint"] is None for row in rows if "boxed{" not in row["response"])
