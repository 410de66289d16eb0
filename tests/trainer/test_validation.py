"""Metrics of a validation: by data set, unbiased in k, and without what could not be graded."""

import numpy as np
import pytest

from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample, Segment
from meds_megatron.trainer.validation import validation_metrics

OUTCOMES = {"R": Grade(True, "graded"), "w": Grade(False, "graded"), "t": Grade(False, "timeout")}


def validated(*spelled: tuple[str, str]) -> dict[str, float]:
    """Metrics of problems given as (data set, outcomes): responses that are right, wrong or ungraded (R, w, t)."""
    config = Config()
    config.rollout.validation_responses = len(spelled[0][1])
    completion = Completion((Segment.drawn(np.array([1, 2, 3]), np.zeros(3, np.float32), [(0, 0)]),), "", "stop")
    groups = []
    for number, (dataset, letters) in enumerate(spelled):
        prompt = Prompt(Problem(f"{dataset}:{number}", letters, "7", dataset), [number])
        groups.append(PromptGroup(prompt, [Sample(prompt, completion, OUTCOMES[letter], 0.0) for letter in letters]))
    metrics = validation_metrics(groups, config)
    return {name.removeprefix("validation/"): value for name, value in metrics.items()}


def test_several_responses_give_mean_at_n_and_pass_at_powers_of_two_and_n():
    metrics = validated(("aime", "Rwwwww"), ("aime", "wwwwww"), ("amc", "RRRwww"))
    assert metrics["accuracy"] == metrics["mean@6"] == pytest.approx((1 / 6 + 0 + 1 / 2) / 3)
    assert metrics["aime/mean@6"] == pytest.approx(1 / 12) and metrics["amc/mean@6"] == pytest.approx(1 / 2)
    assert {name for name in metrics if name.startswith("pass@")} == {"pass@1", "pass@2", "pass@4", "pass@6"}
    assert metrics["pass@1"] == pytest.approx(metrics["mean@6"])
    assert metrics["aime/pass@2"] == pytest.approx((1 / 3 + 0) / 2)
    assert metrics["amc/pass@2"] == pytest.approx(1 - 3 / 15)
    assert metrics["pass@6"] == pytest.approx(2 / 3), "problems with any right response"
    assert "solved" not in metrics


def test_one_response_gives_accuracy_alone():
    metrics = validated(("a", "R"), ("a", "w"), ("b", "w"))
    assert metrics == {
        "grading_failed": 0,
        "response_length_mean": 3.0,
        "accuracy": pytest.approx(1 / 3),
        "a/accuracy": 0.5,
        "b/accuracy": 0.0,
    }


def test_failed_gradings_are_counted_and_left_out():
    metrics = validated(("a", "Rttt"), ("a", "Rwww"), ("a", "tttt"), ("b", "tttt"))
    assert metrics["grading_failed"] == 11
    assert metrics["accuracy"] == metrics["a/accuracy"] == pytest.approx((1 + 1 / 4) / 2)
    assert metrics["pass@1"] == pytest.approx((1 + 1 / 4) / 2)
    assert metrics["pass@4"] == 1.0, "of the one problem with four graded responses"
    assert not any(name.startswith("b/") for name in metrics)
