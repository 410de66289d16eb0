"""A whole run of real parts: engines, trainer ranks, graders and memory shards, from the command line to the export."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.meds_runs import metrics_of

STEPS = 3
PROMPTS = 6
RESPONSES = 8


@pytest.fixture(scope="module")
def run(published_run) -> Path:
    return published_run


@pytest.fixture(scope="module")
def metrics(run) -> list[dict]:
    return metrics_of(run)


def test_every_process_has_a_log_of_its_own(run):
    logs = {path.stem for path in (run / "logs").iterdir()}
    assert logs == {"driver", "engine000", "memory000", "memory001", *(f"rank{rank:05d}" for rank in range(4))}


def test_rollout_rows_hold_what_a_replay_needs(run):
    rows = pq.read_table(run / "rollouts" / "step_000002.parquet").to_pylist()
    assert all(len(row["response_token_ids"]) == row["response_tokens"] for row in rows)
    assert all(row["policy_version"] == 1 and row["source"].startswith("arithmetic/") for row in rows)
    looked_up = [row for row in rows if row["cluster_label"] is not None]
    assert looked_up and all(row["fingerprint"] is not None and not row["correct"] for row in looked_up)
    assert all(row["cluster_size"] == 0 for row in looked_up if row["cluster_label"] == -2)


def test_the_run_has_its_report(run):
    report = (run / "report.html").read_text()
    assert report.startswith("<!DOCTYPE html>") and report.rstrip().endswith("</html>")


def test_every_step_is_reported(metrics):
    assert [line["step"] for line in metrics] == list(range(STEPS + 1))
    for line in (metrics[0], metrics[-1]):
        assert line["validation/arithmetic/accuracy"] == line["validation/accuracy"]
    names = "accuracy/mean reward/mean reward/shaped_mean memory/clusters policy/entropy policy/grad_norm".split()
    names += [f"time/{phase}" for phase in ("step", "rollout", "reward", "forward", "memory", "update", "sync")]
    for line in metrics[1:]:
        assert set(names) <= set(line)
        assert line["response/count"] == PROMPTS * RESPONSES
        assert line["policy/updates"] == 2


def test_engines_and_trainer_agree_on_logprobs_after_every_update(metrics):
    for line in metrics[1:]:
        assert 0 < line["mismatch/logprob_abs_max"] < 1e-3


def test_first_update_of_a_step_is_on_policy(metrics):
    for line in metrics[1:]:
        assert line["policy/kl_first_update"] < 1e-7
        assert line["policy/kl"] > 1e-7


def test_export_is_a_model_that_transformers_loads(run, small_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert [path.name for path in sorted((run / "hf").iterdir())] == ["step_000002", "step_000003"]

    export = run / "hf" / f"step_{STEPS:06d}"
    trained = AutoModelForCausalLM.from_pretrained(export).state_dict()
    before = AutoModelForCausalLM.from_pretrained(small_model).state_dict()
    assert AutoTokenizer.from_pretrained(export).chat_template
    assert trained.keys() == before.keys()
    assert all(trained[name].shape == before[name].shape for name in before)
    moved = [name for name in before if not torch.equal(trained[name], before[name])]
    assert len(moved) == len(before)


def test_a_run_that_cannot_start_leaves_nothing_behind(run_meds, small_model, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(small_model, broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    refused = run_meds.train(tmp_path / "run", broken, {})
    assert refused.returncode == 2
    assert "model.safetensors" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_not_write_into_the_first(run_meds, run):
    refused = run_meds.train(run, run / "hf" / f"step_{STEPS:06d}", {})
    assert refused.returncode == 2
    assert (
        "there is a run with other settings (model.path: " in refused.stderr
        and len(refused.stderr.strip().splitlines()) == 1
    )
