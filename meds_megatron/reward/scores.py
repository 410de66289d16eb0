"""Terms of a response's score besides its correctness: DAPO's over-long penalty and the penalty of MEDS."""

from typing import Literal

import numpy as np

from meds_megatron.config import OverlongConfig

LOG_SIZE_CAP = 2.0


def overlong_penalties(lengths_B: np.ndarray, max_response_tokens: int, config: OverlongConfig) -> np.ndarray:
    """Addends to the scores (float64, 0 or below) for responses near the length limit: DAPO's soft over-long penalty.

    `lengths_B` are response lengths in tokens. A response of up to max_response_tokens - buffer tokens loses nothing;
    from there the loss grows linearly and reaches `config.factor` at max_response_tokens.
    """
    lengths = np.asarray(lengths_B, dtype=np.float64)
    if not config.enabled:
        return np.zeros_like(lengths)
    expected = max_response_tokens - config.buffer
    return np.minimum((expected - lengths) / config.buffer * config.factor, 0.0)


def penalties(sizes_N: np.ndarray, alpha: float) -> np.ndarray:
    """MEDS penalties alpha * min(ln(n + 1), 2) (float64) of mistakes with n earlier ones in their cluster.

    The largest penalty, 2 alpha, applies from n = 7 on.
    """
    return alpha * np.minimum(np.log1p(np.asarray(sizes_N, dtype=np.float64)), LOG_SIZE_CAP)


def shape_scores(
    scores_B: np.ndarray,
    correct_B: np.ndarray,
    penalties_B: np.ndarray,
    target: Literal["wrong", "right", "both", "none"],
) -> np.ndarray:
    """Shaped scores (float64): s - p of a wrong response, s / (1 + p) of a right one, for score s and penalty p.

    `correct_B` is bool. Responses outside the `target` keep their scores.
    """
    scores, correct = np.asarray(scores_B, dtype=np.float64), np.asarray(correct_B, dtype=bool)
    wrong_shaped = scores - penalties_B if target in ("wrong", "both") else scores
    right_shaped = scores / (1.0 + penalties_B) if target in ("right", "both") else scores
    return np.where(correct, right_shaped, wrong_shaped)
