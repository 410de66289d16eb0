"""Cases of several factors of which every pair of values occurs; the other combinations run with `--full`."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest
from allpairspy import AllPairs

from tests.tiers import FULL


def in_turn(first: Iterable[Any], second: Sequence[Any], start: int = 0) -> list:
    """Each of `first` with one of `second`, which take turns beginning with number `start`.

    For factors whose failures show by themselves, whatever the other one is.
    """
    first = list(first)
    chosen = {(value, second[(start + place) % len(second)]) for place, value in enumerate(first)}
    return _parameters(chosen, product(first, second))


def pairwise(*factors: Iterable[Any]) -> list:
    """Combinations of the factors' values in which each value of one meets each value of every other."""
    values = [list(factor) for factor in factors]
    return _parameters({tuple(combination) for combination in AllPairs(values)}, product(*values))


def _parameters(chosen: set[tuple], combinations: Iterable[tuple]) -> list:
    return [pytest.param(*values, marks=[] if values in chosen else [FULL]) for values in combinations]
