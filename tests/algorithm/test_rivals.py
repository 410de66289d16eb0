"""Rivals' advantages: against sums over all subsets, formulas written out group by group, and at their edges."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from meds_megatron.algorithm.advantages import AdvantageInputs, compute_advantages
from meds_megatron.config import AdvantageConfig


def of_one_group(correct, answers=None, counts=None, **settings) -> list[float]:
    correct_B = torch.tensor(correct, dtype=torch.bool)
    answers_B = None if answers is None else torch.tensor(answers)
    counts_B = None if counts is None else torch.tensor(counts)
    groups_B = torch.zeros(len(correct), dtype=torch.long)
    inputs = AdvantageInputs(correct_B.double(), correct_B, groups_B, answers_B, counts_B)
    return compute_advantages(inputs, AdvantageConfig(**settings)).advantages_B.tolist()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("right", [0, 1, 3, 5, 6])
def test_pass_at_k_is_the_mean_over_all_subsets(k, right):
    correct = [True] * right + [False] * (6 - right)
    subsets = list(itertools.combinations(range(6), k))
    rewards = np.array([float(any(correct[member] for member in subset)) for subset in subsets])
    deviation = rewards.std() + 1e-6
    expected = [
        np.mean([rewards[number] for number, subset in enumerate(subsets) if member in subset]) - rewards.mean()
        for member in range(6)
    ]
    found = of_one_group(correct, estimator="pass_at_k", pass_k=k)
    # In logarithms, binomials are exact to a few units of the last place, over a deviation that may be 1e-6.
    assert found == pytest.approx([value / deviation for value in expected], rel=1e-9, abs=1e-7)


def test_pass_at_k_of_a_group_smaller_than_k_takes_the_whole_group():
    assert of_one_group([True, False], estimator="pass_at_k", pass_k=4) == pytest.approx([0, 0], abs=1e-6)


def edas_by_definition(advantages, correct, answers, alpha, beta, kappa) -> list[float]:
    wrong = [row for row, right in enumerate(correct) if not right]
    shares = {answer: count / len(wrong) for answer, count in Counter(answers[row] for row in wrong).items()}
    entropy = -sum(share * math.log(share) for share in shares.values())
    strength = sum(abs(advantages[row]) for row in wrong) / max(len(wrong), 1)
    shaped = list(advantages)
    for row in wrong:
        if len(shares) > 1:
            change = alpha * strength * (-math.log(shares[answers[row]]) - entropy) / math.log(len(wrong))
        else:
            change = -beta * strength
        limit = abs(advantages[row]) / kappa
        shaped[row] += min(max(change, -limit), limit)
    return shaped


@pytest.mark.parametrize("alpha", [0.4, 5.0])
def test_error_diversity_by_definition_in_mixed_groups(alpha):
    rng = np.random.default_rng(0)
    settings = dict(diversity_alpha=alpha, diversity_beta=0.3)
    groups_B = torch.from_numpy(rng.permutation(np.repeat(np.arange(40), 8)))
    correct_B = torch.from_numpy(rng.random(320) < 0.4)
    answers_B = torch.from_numpy(rng.integers(0, 3, 320))
    scores_B = correct_B.double() - torch.from_numpy(0.1 * rng.random(320))
    inputs = AdvantageInputs(scores_B, correct_B, groups_B, answers_B)
    plain_B = compute_advantages(inputs, AdvantageConfig()).advantages_B
    shaped_B = compute_advantages(inputs, AdvantageConfig(**settings)).advantages_B
    for group in range(40):
        rows = (groups_B == group).nonzero()[:, 0]
        columns = (values_B[rows].tolist() for values_B in (plain_B, correct_B, answers_B))
        assert shaped_B[rows].tolist() == pytest.approx(edas_by_definition(*columns, alpha, 0.3, 2.0), abs=1e-12)


def test_one_class_of_wrong_answers_falls_by_beta_and_right_ones_stay():
    plain = of_one_group([True, False, False])
    shaped = of_one_group([True, False, False], [1, 2, 2], diversity_beta=0.2)
    assert shaped == pytest.approx([plain[0], 1.2 * plain[1], 1.2 * plain[2]])
    # A lone wrong answer is a class of its own; the change is half of it at most.
    assert of_one_group([True, False], [1, 2], diversity_beta=0.9)[1] == pytest.approx(1.5 * of_one_group([1, 0])[1])


def test_nothing_wrong_and_nothing_at_all_are_left_alone():
    assert of_one_group([True, True], [1, 1], diversity_alpha=0.4, diversity_beta=0.2) == [0, 0]
    assert of_one_group([], [], [], diversity_alpha=1.0, focal_gamma=1.0, count_coefficient=1.0) == []
    assert of_one_group([], estimator="pass_at_k") == []


def test_focal_weights_are_per_group_and_zero_where_all_is_right():
    correct_B = torch.tensor([True, False, True, True, True, False, False, False])
    groups_B = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5])
    inputs = AdvantageInputs(correct_B.double(), correct_B, groups_B)
    plain_B = compute_advantages(inputs, AdvantageConfig()).advantages_B
    output = compute_advantages(inputs, AdvantageConfig(focal_gamma=2.0))
    weights_B = torch.tensor([1 / 16] * 4 + [9 / 16] * 4, dtype=torch.float64)
    torch.testing.assert_close(output.advantages_B, plain_B * weights_B)
    assert output.metrics == {"focal_weight": pytest.approx(5 / 16)}
    assert of_one_group([True, True], focal_gamma=1.0) == [0, 0]


def test_counts_add_a_bonus_that_shrinks_with_the_root_and_skip_what_was_not_looked_up():
    plain = of_one_group([True, False, False, False, False])
    shaped = of_one_group(
        [True, False, False, False, False], counts=[0, 1, 4, 100, -1], count_coefficient=0.2, count_baseline=0.5
    )
    # 1, 1, 1/2 and 1/10, less 1/2.
    added = [after - before for after, before in zip(shaped, plain, strict=True)]
    assert added == pytest.approx([0.1, 0.1, 0.0, -0.08, 0.0])
