"""Effects of single settings from runs that have half of all combinations of them: a fractional factorial experiment.

Each setting is on in half of the runs and off in the others, so that its effect is a difference between all runs, not
between the few of two methods. The half with an even number of settings on (resolution IV for four settings: Box,
Hunter and Hunter, "Statistics for Experimenters", chapter 6) keeps every effect apart from those of all pairs, where
each run is there and equally often.

An interval is of the chance between runs of the blocks that there are, taken as the same in all of them. What an effect
is with other seeds can differ by more than that.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t


class Observation(NamedTuple):
    """A run: the settings that are on, its block (runs that begin alike) and what was measured."""

    on: frozenset[str]
    block: tuple
    value: float


def half_of_combinations(settings: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of an even number of settings, the empty one first."""
    return [chosen for count in range(0, len(settings) + 1, 2) for chosen in combinations(settings, count)]


def effects(settings: Sequence[str], observations: Sequence[Observation]) -> dict[str, tuple[float, float] | None]:
    """Change of the value that each setting makes, as an average over the others, and half-width of its 95 % interval:
    least squares of additive effects and a mean for each block (Student's t with the residual degrees of freedom).

    None for all settings where the runs are too few to separate their effects from each other and from chance.
    """
    blocks = sorted({one.block for one in observations})
    design = np.array(
        [
            [float(name in one.on) for name in settings] + [float(one.block == block) for block in blocks]
            for one in observations
        ]
    ).reshape(len(observations), len(settings) + len(blocks))
    left = len(observations) - design.shape[1]
    if left < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return dict.fromkeys(settings)
    values = np.array([one.value for one in observations])
    found, *_ = np.linalg.lstsq(design, values, rcond=None)
    variance = float(np.sum((values - design @ found) ** 2)) / left
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    half = errors * float(student_t.ppf(0.975, left))
    return {name: (float(found[i]), float(half[i])) for i, name in enumerate(settings)}
