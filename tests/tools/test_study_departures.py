"""Effects of single settings, against scipy's t-tests and values that are made by hand."""

import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.append(str(Path(__file__).parents[2] / "tools" / "study"))
from study_departures import Observation, effects, half_of_combinations

FOUR = list("abcd")


def test_half_of_the_combinations_has_each_setting_and_each_pair_equally_often():
    runs = [set(chosen) for chosen in half_of_combinations(FOUR)]
    assert len(runs) == 8 and runs[0] == set()
    for name in FOUR:
        assert sum(name in run for run in runs) == 4
    for pair in combinations(FOUR, 2):
        assert sum(run.issuperset(pair) for run in runs) == 2


def test_one_setting_is_the_t_test_of_two_samples():
    off, on = [0.31, 0.35, 0.30], [0.40, 0.38, 0.45, 0.41]
    runs = [Observation(frozenset(), (0,), value) for value in off]
    runs += [Observation(frozenset("a"), (0,), value) for value in on]
    interval = stats.ttest_ind(on, off).confidence_interval()
    effect, half = effects(["a"], runs)["a"]
    assert (effect - half, effect + half) == pytest.approx((interval.low, interval.high))


def test_runs_of_one_block_are_compared_as_pairs():
    off, on = np.array([0.1, 0.5, 0.9]), np.array([0.2, 0.65, 0.95])
    runs = [Observation(frozenset(), (seed, "start"), value) for seed, value in enumerate(off)]
    runs += [Observation(frozenset("a"), (seed, "start"), value) for seed, value in enumerate(on)]
    interval = stats.ttest_rel(on, off).confidence_interval()
    effect, half = effects(["a"], runs)["a"]
    assert (effect - half, effect + half) == pytest.approx((interval.low, interval.high))


def test_pairs_of_settings_that_work_together_leave_the_single_effects_as_they_are():
    rng = np.random.default_rng(0)
    single = dict(zip(FOUR, rng.normal(size=4), strict=True))
    pairs = {pair: rng.normal() for pair in combinations(FOUR, 2)}

    def signs(chosen: tuple, names: tuple) -> float:
        return float(np.prod([1 if name in chosen else -1 for name in names]))

    runs = [
        Observation(
            frozenset(chosen),
            (seed,),
            10.0 * seed
            + sum(effect / 2 * signs(chosen, (name,)) for name, effect in single.items())
            + sum(strength * signs(chosen, pair) for pair, strength in pairs.items()),
        )
        for chosen in half_of_combinations(FOUR)
        for seed in (0, 1)
    ]
    found = effects(FOUR, runs)
    assert {name: effect for name, (effect, _) in found.items()} == pytest.approx(single)


def test_too_few_runs_have_no_effects():
    none = dict.fromkeys(FOUR)
    assert effects(FOUR, []) == none
    published = [Observation(frozenset(), (seed,), 0.5) for seed in range(9)]
    assert effects(FOUR, published) == none
    assert effects(["a"], [Observation(frozenset("a"), (0,), 0.1), Observation(frozenset(), (0,), 0.2)]) == {"a": None}
