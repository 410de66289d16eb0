"""Two whole runs, in the published setting and with our departures, replayed without any code of the trainer."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.trainer.replay import NOISE, UNKNOWN, Replay, ReplayedStep

STEPS = 3


@pytest.fixture(scope="module", params=["published_run", "departures_run"])
def run(request, run_meds) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def replay(run, small_model) -> Replay:
    return Replay(run, small_model)


@pytest.fixture(scope="module")
def steps(replay) -> list[ReplayedStep]:
    return [replay.step(number) for number in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def metrics(run, steps) -> list[dict]:
    """One dict a step, without the validation before the first."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 0]


def stored(step: ReplayedStep, name: str) -> list:
    return [row[name] for row in step.rows]


def test_grades_and_scores_follow_from_the_text(steps):
    for step in steps:
        assert stored(step, "correct") == step.columns["correct"]
        assert stored(step, "score") == pytest.approx(step.columns["score"], abs=1e-6)
        assert stored(step, "prompt_tokens") == [len(row["prompt_ids"]) for row in step.rows]


def test_cluster_sizes_are_those_of_fresh_fits_over_the_mistakes_of_earlier_steps(replay, steps):
    recurring = decided = 0
    for step in steps:
        for size, possible in zip(stored(step, "cluster_size"), step.columns["cluster_size"], strict=True):
            assert size in possible
            recurring += size > 0
            decided += len(possible) == 1
    assert recurring > 20 and decided > 0.8 * sum(len(step.rows) for step in steps)


def test_cluster_labels_are_a_renumbering_of_those_of_fresh_fits(steps):
    checked = 0
    for step in steps:
        numbers: dict[tuple[str, int], set[int]] = defaultdict(set)
        for row, possible in zip(step.rows, step.columns["cluster_label"], strict=True):
            if possible is not None and len(possible) == 1:
                numbers[row["key"], *possible].add(row["cluster_label"])
                checked += possible != {UNKNOWN}
        assert all(len(found) == 1 for found in numbers.values())
        renumbered = {(key, *found): label for (key, label), found in numbers.items()}
        assert len(renumbered) == len(numbers)
        for (_, number), label in renumbered.items():
            assert number == label if label in (NOISE, UNKNOWN) else number >= 0
    assert checked > 20


def test_penalties_shaped_scores_and_advantages_follow(steps):
    for step in steps:
        assert stored(step, "kept") == step.columns["kept"]
        for name in ("penalty", "shaped_score"):
            assert stored(step, name) == pytest.approx(step.columns[name], abs=1e-6)
        for advantage, expected in zip(stored(step, "advantage"), step.columns["advantage"], strict=True):
            assert (advantage is None) == (expected is None)
            assert advantage is None or advantage == pytest.approx(expected, abs=1e-5)


def test_fingerprints_are_those_of_transformers_with_replayed_weights(steps):
    checked = 0
    for step in steps:
        for row, expected in zip(step.rows, step.columns["fingerprint"], strict=True):
            assert row["fingerprint"] is None or row["fingerprint"] == pytest.approx(expected, abs=1e-4)
            if expected is not None and row["kept"]:
                assert row["fingerprint"] is not None
            checked += row["fingerprint"] is not None
    assert checked > 40


def test_losses_and_gradient_norms_are_those_of_a_plain_training_loop(steps, metrics):
    for step, line in zip(steps, metrics, strict=True):
        assert line["policy/updates"] == len(step.losses)
        assert line["policy/loss"] == pytest.approx(np.mean(step.losses), rel=1e-4, abs=1e-7)
        assert line["policy/grad_norm"] == pytest.approx(np.mean(step.grad_norms), rel=1e-4)
        assert line["policy/entropy"] == pytest.approx(step.entropy, rel=1e-4)


def test_every_mistake_is_remembered(steps, metrics, replay):
    assert metrics[-1]["memory/vectors"] == sum(len(vectors) for vectors in replay.vectors.values()) > 0
    assert metrics[-1]["memory/no_answer"] == sum(map(len, replay.no_answer.values()))
    for line in metrics:
        assert line["mismatch/logprob_abs_max"] < 1e-3 and line["policy/kl_first_update"] < 1e-7
        for name in ("keys", "clusters", "noise_share", "hit_share", "saturated_share", "top_eigenvalue_share"):
            assert f"memory/{name}" in line
        for shard in range(2):
            assert line[f"memory/lookup_seconds_shard_{shard}"] <= line["memory/lookup_seconds_max"]
            assert line[f"memory/recluster_seconds_shard_{shard}"] <= line["memory/recluster_seconds_max"]


@pytest.mark.parametrize("run", ["published_run"], indirect=True)
def test_the_published_run_has_right_answers_and_several_updates_a_step(steps):
    assert sum(stored(step, "correct").count(True) for step in steps) > 3
    assert [len(step.losses) for step in steps] == [2] * STEPS


@pytest.mark.parametrize("run", ["published_run"], indirect=True)
def test_trained_weights_are_those_of_a_plain_training_loop(run, replay, steps):
    trained = AutoModelForCausalLM.from_pretrained(run / "hf" / f"step_{STEPS:06d}").state_dict()
    for name, weight in replay.model.state_dict().items():
        difference = (trained[name] - weight).abs()
        assert difference.mean() < 1e-7 and difference.max() < 5e-6, name
    assert torch.equal(trained["lm_head.weight"], trained["model.embed_tokens.weight"])


@pytest.mark.parametrize("run", ["departures_run"], indirect=True)
def test_the_departures_are_seen(steps):
    """Mistakes without an answer are punished, groups are dropped, and advantages of unsolved groups are floored."""
    rows = [row for step in steps for row in step.rows]
    assert any(row["fingerprint"] is None and row["cluster_size"] > 0 for row in rows)
    assert not all(row["kept"] for row in rows)
    assert any(row["penalty"] is not None and not row["kept"] for row in rows)
    unsolved = [row for step in steps for row in step.rows if row["kept"] and not solved(step, row["group"])]
    assert unsolved and max(abs(row["advantage"]) for row in unsolved) < 1.0


def solved(step: ReplayedStep, group: int) -> bool:
    return any(row["correct"] for row in step.rows if row["group"] == group)
