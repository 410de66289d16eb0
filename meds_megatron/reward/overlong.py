"""DAPO's soft over-long penalty: responses near the length limit lose score little by little instead of at once."""

import numpy as np

from meds_megatron.config import OverlongConfig


def overlong_penalties(lengths_B: np.ndarray, max_response_tokens: int, config: OverlongConfig) -> np.ndarray:
    """What to add to each score (float64, 0 or below).

    `lengths_B` are tokens of the responses. Up to max_response_tokens - buffer nothing is lost; from there the loss
    grows linearly and reaches `config.factor` at max_response_tokens.
    """
    lengths = np.asarray(lengths_B, dtype=np.float64)
    if not config.enabled:
        return np.zeros_like(lengths)
    expected = max_response_tokens - config.buffer
    return np.minimum((expected - lengths) / config.buffer * config.factor, 0.0)
