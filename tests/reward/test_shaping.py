import math

import numpy as np
import pytest

from meds_megatron.reward.shaping import penalties, shape_scores


def test_the_penalty_grows_with_the_logarithm_up_to_two_alpha():
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
def test_only_the_target_is_shaped(target, expected):
    # The last two answers were over-long: a right one of score 0.5 and a wrong one of score -0.5.
    scores_B = np.array([1.0, 0.0, 0.5, -0.5])
    correct_B = np.array([True, False, True, False])
    penalties_B = np.array([0.25, 0.2, 0.25, 0.2])
    np.testing.assert_allclose(shape_scores(scores_B, correct_B, penalties_B, target), expected)
    assert scores_B.tolist() == [1.0, 0.0, 0.5, -0.5]
