import math
from itertools import combinations, product

import numpy as np
import pytest
from scipy import stats

from meds_megatron.evaluation.statistics import (
    accuracy_metrics,
    answer_groups,
    bootstrap_interval,
    majority_correct,
    pass_at_k,
    pass_estimates,
    top_eigenvalue_ratio,
)


@pytest.mark.parametrize("responses", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_k_responses_of_which_one_is_right(responses):
    for right in range(responses + 1):
        for k in range(1, responses + 1):
            draws = list(combinations([True] * right + [False] * (responses - right), k))
            assert pass_at_k(responses, right, k) == pytest.approx(np.mean([any(draw) for draw in draws]))


@pytest.mark.parametrize(("responses", "right"), [(16, 1), (128, 3), (128, 64), (1000, 2)])
def test_pass_at_k_is_the_hypergeometric_chance_of_a_right_response(responses, right):
    for k in (1, 8, 16):
        expected = 1 - stats.hypergeom(responses, right, k).pmf(0)
        assert pass_at_k(responses, right, k) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("accuracy", [0.1, 0.5, 0.9])
def test_pass_at_k_has_no_bias(accuracy):
    """Its mean over all outcomes of six responses is the probability that one of k independent ones is right."""
    for k in range(1, 7):
        mean = sum(
            math.prod(accuracy if right else 1 - accuracy for right in outcome) * pass_at_k(6, sum(outcome), k)
            for outcome in product([0, 1], repeat=6)
        )
        assert mean == pytest.approx(1 - (1 - accuracy) ** k)


def test_problems_with_too_few_graded_responses_do_not_count():
    assert pass_estimates([[1, 0], [1], []], 2) == [1.0]
    assert accuracy_metrics([[], []], 4) == {}
    expected = {"accuracy": 2 / 3, "mean@3": 2 / 3, "pass@1": 2 / 3, "pass@2": 2 / 3, "pass@3": 1.0}
    assert accuracy_metrics([[1, 0, 0], [1]], 3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["2", "2.0", "3"], [True, True, False], 1.0),
        (["3", "2", "3"], [False, True, False], 0.0),
        (["3", "2", "", ""], [False, True, False, False], 0.5),
        (["3", "2", "4"], [False, True, False], 1 / 3),
        (["3", "4"], [False, False], 0.0),
        (["", ""], [False, False], 0.0),
        (["2", "3", "3"], [True, None, None], 0.0),
    ],
)
def test_majority(answers, correct, expected):
    assert majority_correct(answers, correct) == pytest.approx(expected)


def test_answers_are_distinct_by_text_but_right_ones_are_one():
    assert len(answer_groups(["2", "2.0", "3", "3", "4", ""], [True, True, False, False, False, False])) == 3


def test_the_interval_is_that_of_scipys_bootstrap():
    values = np.random.default_rng(1).random(40)
    low, high = bootstrap_interval(values)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=2000, random_state=np.random.default_rng(5)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([1.0, 1.0]) == (1.0, 1.0)


def test_top_eigenvalue_ratio_is_that_of_the_covariance():
    vectors = np.random.default_rng(2).normal(size=(30, 5)) * [5, 1, 1, 1, 1]
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.T))
    assert top_eigenvalue_ratio(vectors) == pytest.approx(eigenvalues[-1] / eigenvalues.sum())
    assert top_eigenvalue_ratio(np.outer(np.arange(4), [1.0, 2.0])) == pytest.approx(1.0)
    assert np.isnan(top_eigenvalue_ratio(vectors[:1])) and np.isnan(top_eigenvalue_ratio(np.ones((3, 2))))
