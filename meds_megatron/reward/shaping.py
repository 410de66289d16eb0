"""MEDS: a mistake that was seen before costs more, the more often it was seen."""

from typing import Literal

import numpy as np

LOG_SIZE_CAP = 2.0


def penalties(sizes_N: np.ndarray, alpha: float) -> np.ndarray:
    """p_N = alpha * min(ln(n + 1), 2) (float64) for mistakes that were seen n times; at most 2 alpha, from n = 7 on."""
    return alpha * np.minimum(np.log1p(np.asarray(sizes_N, dtype=np.float64)), LOG_SIZE_CAP)


def shape_scores(
    scores_B: np.ndarray,
    correct_B: np.ndarray,
    penalties_B: np.ndarray,
    target: Literal["wrong", "right", "both", "none"],
) -> np.ndarray:
    """The shaped scores (float64): a wrong response loses its penalty p, a right one is divided by 1 + p.

    `correct_B` is bool. Only responses of the `target` are shaped; the others keep their scores.
    """
    scores, correct = np.asarray(scores_B, dtype=np.float64), np.asarray(correct_B, dtype=bool)
    wrong_shaped = scores - penalties_B if target in ("wrong", "both") else scores
    right_shaped = scores / (1.0 + penalties_B) if target in ("right", "both") else scores
    return np.where(correct, right_shaped, wrong_shaped)
