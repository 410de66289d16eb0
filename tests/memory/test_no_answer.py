"""Responses without an answer, and so without a fingerprint: one cluster under a key of their own."""

import numpy as np
import pytest

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import UNKNOWN, MemoryShard, shard_of, step_metrics

KEY = "problem|wrong|no_answer"
FINGERPRINTS = np.random.default_rng(0).normal(size=(9, 16)) + 5


def none_of(count: int) -> np.ndarray:
    return np.empty((count, 0), np.float32)


def sizes(shard: MemoryShard, count: int = 1) -> list[int]:
    return shard.lookup([KEY] * count, none_of(count)).tolist()


def filled(config: MemoryConfig, *counts: int) -> MemoryShard:
    shard = MemoryShard(config)
    for count in counts:
        shard.remember([KEY] * count, none_of(count))
        shard.recluster()
    return shard


@pytest.mark.parametrize("config", [MemoryConfig(), MemoryConfig(noise="ignore", allow_single_cluster=True)])
def test_the_size_is_the_number_of_earlier_ones_from_the_first_on(config):
    shard = MemoryShard(config)
    match = shard.match([KEY], none_of(1))
    assert (match.sizes_N.tolist(), match.labels_N.tolist()) == ([0], [UNKNOWN])
    shard.remember([KEY], none_of(1))
    assert sizes(shard) == [0]
    shard.recluster()
    assert sizes(shard, 2) == [1, 1]
    shard.remember([KEY] * 3, none_of(3))
    shard.recluster()
    assert sizes(shard) == [4]
    assert shard.labels(KEY).tolist() == [0, 0, 0, 0]
    assert shard.lookup(["other|wrong|no_answer"], none_of(1)).tolist() == [0]


def test_windows_and_half_lives_apply_to_them():
    assert sizes(filled(MemoryConfig(window=5), 4, 3)) == [5]
    # Two and one steps old: 8 / 2 + 4 / sqrt(2) = 6.83.
    assert sizes(filled(MemoryConfig(half_life_steps=2), 8, 4)) == [7]


def test_the_budget_holds_for_them_too():
    budget = 10_000
    alone = filled(MemoryConfig(budget_gib=budget / 2**30), *[300] * 6)
    assert alone.bytes_used <= budget and 500 < sizes(alone)[0] < 1800
    both = MemoryShard(MemoryConfig(budget_gib=budget / 2**30))
    for number in range(12):
        both.remember([f"{number}|wrong"] * 9, FINGERPRINTS)
        both.remember([f"{number}|wrong|no_answer"] * 9, none_of(9))
        both.recluster()
        assert both.bytes_used <= budget
    assert len(both.labels("11|wrong")) and len(both.labels("11|wrong|no_answer"))


def test_metrics_of_fingerprints_are_as_without_them():
    plain, shard = MemoryShard(MemoryConfig()), filled(MemoryConfig(window=20), 7, 30)
    for one in (plain, shard):
        one.remember(["problem|wrong"] * 9, FINGERPRINTS)
        one.recluster()
    with_them, without = step_metrics([shard.stats()]), step_metrics([plain.stats()])
    for name in ("keys", "vectors", "clusters", "noise_share", "top_eigenvalue_share"):
        assert with_them[f"memory/{name}"] == without[f"memory/{name}"], name
    assert (with_them["memory/no_answer"], without["memory/no_answer"]) == (20, 0)
    assert with_them["memory/evicted_vectors"] == 17
    sizes(shard, 4)
    metrics = step_metrics([shard.stats()])
    assert metrics["memory/hit_share"] == metrics["memory/saturated_share"] == 1
    assert metrics["memory/lookup_size_mean"] == 20


@pytest.mark.parametrize("loaded_on", [1, 3])
def test_they_are_saved_with_the_rest_and_loaded_on_any_number_of_shards(tmp_path, loaded_on):
    shard = filled(MemoryConfig(half_life_steps=3.0), 4, 5)
    shard.remember(["problem|wrong"] * 9, FINGERPRINTS)
    shard.recluster()
    shard.save(tmp_path / "first")
    shard.remember([KEY] * 2, none_of(2))
    shard.recluster()
    shard.remember([KEY, KEY], none_of(2))  # not clustered yet
    shard.save(tmp_path / "second")
    loaded = [MemoryShard.load(tmp_path / "second", rank=rank, shards=loaded_on) for rank in range(loaded_on)]
    for key, fingerprints in ((KEY, none_of(1)), ("problem|wrong", FINGERPRINTS[:1])):
        owner = loaded[shard_of(key, loaded_on)]
        assert owner.lookup([key], fingerprints).tolist() == shard.lookup([key], fingerprints).tolist()
    for one in (shard, *loaded):
        one.recluster()
    assert sizes(loaded[shard_of(KEY, loaded_on)]) == sizes(shard)
    assert sum(one.stats()["no_answer"] for one in loaded) == shard.stats()["no_answer"] == 13


def test_a_key_is_of_responses_with_fingerprints_or_without():
    shard = filled(MemoryConfig(), 3)
    for use in (shard.lookup, shard.remember):
        with pytest.raises(UserError, match="A vector of 14 layers came to a memory of vectors of 0"):
            use([KEY], FINGERPRINTS[:1])
