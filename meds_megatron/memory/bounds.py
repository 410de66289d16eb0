"""How much a shard may hold, and what goes first."""

import numpy as np

from meds_megatron.memory.history import KEY_BYTES

SLACK = 7 / 8
"""Share of the budget left in use when it was passed, so that making room is rare."""


def keys_that_fit(budget_bytes: float, record_bytes: int) -> int:
    """Keys that the budget holds with one vector each, after making room."""
    return int(budget_bytes * SLACK // (KEY_BYTES + record_bytes))


def longest_history(lengths_K: np.ndarray, budget_bytes: float, record_bytes: int) -> int:
    """The greatest length to which histories can be cut so that all fit, after making room; at least 1.

    Cutting the longest first costs the least: a penalty is at its most from seven vectors of a cluster on.
    """
    room = (budget_bytes * SLACK - len(lengths_K) * KEY_BYTES) // record_bytes
    ascending_K = np.sort(np.asarray(lengths_K, dtype=np.int64))
    below_K = np.concatenate([[0], np.cumsum(ascending_K)[:-1]])
    longer_K = len(ascending_K) - np.arange(len(ascending_K))
    limits_K = (room - below_K) // longer_K
    fits_K = limits_K < ascending_K
    return max(int(limits_K[np.argmax(fits_K)]) if fits_K.any() else int(ascending_K[-1]), 1)
