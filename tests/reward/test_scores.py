import math

import numpy as np
import pytest

from meds_megatron.config import OverlongConfig
from meds_megatron.reward.scores import overlong_penalties, penalties, shape_scores


def test_penalty_grows_with_the_logarithm_up_to_two_alpha():
    sizes_N = np.array([0, 1, 6, 7, 8, 1_000_000])
    expected_N = [0.0, 0.1 * math.log(2), 0.1 * math.log(7), 0.2, 0.2, 0.2]
    np.testing.assert_allclose(penalties(sizes_N, alpha=0.1), expected_N, rtol=1e-15)
    assert penalties(np.array([7]), alpha=0.0).tolist() == [0.0]
    assert penalties(np.zeros(0, dtype=np.int64), alpha=0.1).shape == (0,)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("wrong", [1.0, -0.2, 0.5, -0.7]),
        ("right", [0.8, 0.0, 0.4, -0.5]),
        ("both", [0.8, -0.2, 0.4, -0.7]),
        ("none", [1.0, 0.0, 0.5, -0.5]),
    ],
)
def test_only_responses_of_the_target_are_shaped(target, expected):
    # The last two answers were over-long: a right one of score 0.5 and a wrong one of score -0.5.
    scores_B = np.array([1.0, 0.0, 0.5, -0.5])
    correct_B = np.array([True, False, True, False])
    penalties_B = np.array([0.25, 0.2, 0.25, 0.2])
    np.testing.assert_allclose(shape_scores(scores_B, correct_B, penalties_B, target), expected)
    assert scores_B.tolist() == [1.0, 0.0, 0.5, -0.5]


def test_overlong_penalty_at_the_edges_of_the_buffer():
    lengths_B = [0, 2559, 2560, 2561, 2816, 3071, 3072]
    penalties_B = overlong_penalties(np.array(lengths_B), 3072, OverlongConfig())
    np.testing.assert_allclose(penalties_B, [0, 0, 0, -1 / 512, -0.5, -511 / 512, -1], rtol=0, atol=0)
    assert not np.signbit(penalties_B[:3]).any()


def test_overlong_penalty_uses_factor_and_buffer():
    config = OverlongConfig(buffer=4, factor=0.5)
    np.testing.assert_array_equal(overlong_penalties(np.array([12, 14, 16]), 16, config), [0, -0.25, -0.5])


def test_overlong_penalty_switched_off_is_zero():
    config = OverlongConfig(enabled=False, buffer=0)
    np.testing.assert_array_equal(overlong_penalties(np.array([1, 99]), 16, config), [0, 0])
