"""A run whose engines generate for later steps while the trainer computes: engines are killed, it is resumed, and every
prompt is trained on once, in time."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from meds_megatron.data.sampler import PromptSampler
from tests.meds_runs import metrics_of, overrides

STEPS, SAVED_STEP, RESUMED_STEPS = 6, 4, 7
PROMPTS, PROBLEMS, RESPONSES = 4, 50, 8
STALENESS = 2


SETTINGS = {
    "cluster.ranks_per_node": 1,
    "parallel.pipeline": 1,
    "data.limit_train": PROBLEMS,
    "data.limit_validation": 8,
    "filter.metric": "none",
    "reward.overlong.buffer": 38,
    "rollout.deterministic": "false",
    "rollout.engines": 2,
    # Generation takes longer than an update.
    "rollout.max_num_seqs": 4,
    "rollout.responses_per_prompt": RESPONSES,
    "train.prompts_per_step": PROMPTS,
    "train.mini_batch_prompts": 2,
    "train.micro_batch_tokens": 1024,
    "train.validate_every": 4,
    "train.max_staleness": STALENESS,
    "train.export_hf": "false",
    "checkpoint.every": SAVED_STEP,
    "optimizer.lr": 3e-3,
    "optimizer.warmup_steps": 0,
    "sync.checksum_every": 1,
}


@pytest.fixture(scope="module")
def run(run_meds, cpu_engines, small_model, tmp_path_factory) -> Path:
    """The directory of a run of STEPS steps in which engines are killed, resumed from SAVED_STEP to RESUMED_STEPS with
    the other way of updating engines."""
    directory = tmp_path_factory.mktemp("run") / "run"
    settings = overrides(directory, small_model, SETTINGS | {"train.steps": STEPS})
    run_meds.check(run_meds.run_module("tests.faults.killed_engines_run", "configs/quickstart.yaml", *settings))
    # As if the process had died while it wrote its last checkpoint.
    (directory / "checkpoints" / f"step_{STEPS:06d}" / "complete.json").unlink()
    resumed = {"train.steps": RESUMED_STEPS, "rollout.on_update": "finish"}
    return run_meds.finished_run(directory, small_model, SETTINGS | resumed)


def steps_of(run: Path) -> list[list[dict]]:
    """Rows of each step's rollout file."""
    return [pq.read_table(file).to_pylist() for file in sorted((run / "rollouts").iterdir())]


def test_every_step_is_full_and_none_trains_on_what_is_too_old(run):
    steps = [line for line in metrics_of(run) if line["step"]]
    assert [line["step"] for line in steps] == list(range(1, RESUMED_STEPS + 1))
    for step, rows in zip(steps, steps_of(run), strict=True):
        assert step["response/count"] == len(rows) == PROMPTS * RESPONSES and all(row["kept"] for row in rows)
        assert step["staleness/max"] == max(step["step"] - 1 - row["policy_version"] for row in rows) <= STALENESS
    assert max(step["staleness/max"] for step in steps) > 0


def test_killed_engines_restart(run):
    steps = [line for line in metrics_of(run) if line["step"]]
    assert sum(step["rollout/engine_restarts"] for step in steps) == 2


def test_prompts_in_flight_are_in_the_checkpoint_and_trained_on_once(run):
    checkpoints = run / "checkpoints"
    state = json.loads((checkpoints / f"step_{SAVED_STEP:06d}" / "state.json").read_text())["state"]
    sampler = PromptSampler(PROBLEMS, seed=0)
    drawn = sampler.next(state["sampler"]["position"])
    assert len(state["unfinished"]) == STALENESS * PROMPTS
    assert len(drawn) == SAVED_STEP * PROMPTS + len(state["unfinished"])
    assert set(state["unfinished"]) <= set(drawn)
    seen = Counter(row["key"].partition("|")[0] for rows in steps_of(run) for row in rows)
    assert set(seen.values()) == {RESPONSES} and len(seen) == RESUMED_STEPS * PROMPTS
    assert sampler.next(len(seen) - len(drawn)) and sampler.position == len(seen), "no prompt is drawn for nothing"
    state = json.loads((checkpoints / f"step_{RESUMED_STEPS:06d}" / "state.json").read_text())["state"]
    assert state["unfinished"] == [] and state["sampler"]["position"] == len(seen)


def test_tokens_of_one_response_keep_their_versions(run):
    continued = [row for rows in steps_of(run)[:SAVED_STEP] for row in rows]
    finished = [row for rows in steps_of(run)[SAVED_STEP:] for row in rows]
    changed = [row for row in continued if row["later_versions"]]
    assert changed and not any(row["later_versions"] for row in finished)
    for row in changed:
        versions, starts = np.array(row["later_versions"]).T
        assert (np.diff([row["policy_version"], *versions]) > 0).all()
        assert (np.diff([0, *starts, row["response_tokens"]]) > 0).all()
    shares = [line["staleness/mixed_share"] for line in metrics_of(run) if line["step"]]
    assert max(shares[:SAVED_STEP]) > 0 and max(shares[SAVED_STEP:]) == 0


def test_stale_responses_are_corrected(run):
    """The policy has moved away from the one that drew them, and the correction weighs them by how far; trainer and
    engines compute the same with the same weights."""
    steps = [line for line in metrics_of(run) if line["step"]]
    assert all(line.get("mismatch/logprob_abs_mean", 0.0) < 1e-4 for line in steps)
    assert steps[0]["staleness/logprob_abs_mean"] < 1e-4
    stale = [line for line in steps if line["staleness/mean"] > 0.5]
    assert stale and all(line["staleness/logprob_abs_mean"] > 1e-3 for line in stale)
    assert all(0 < line["policy/importance_effective_share"] < 1 - 1e-5 for line in stale)
