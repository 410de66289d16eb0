import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.memory import MemoryShard
from meds_megatron.memory.history import longest_history
from tests.memory.reference import fresh_labels, partition


def batches(steps: int, size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 6))
    return [
        (centres[rng.integers(3, size=size)] + 0.2 * rng.normal(size=(size, 6))).astype(np.float32)
        for _ in range(steps)
    ]


def test_a_window_keeps_the_newest_vectors_and_clusters_only_them():
    config = MemoryConfig(window=20)
    shard, everything = MemoryShard(config), np.empty((0, 6), np.float32)
    for batch in batches(8, 7):
        shard.remember(["problem"] * 7, batch)
        shard.recluster()
        everything = np.concatenate([everything, batch])[-20:]
        assert partition(shard.labels("problem")) == partition(fresh_labels(everything, config))
    stats = shard.stats()
    assert (stats["vectors"], stats["evicted_vectors"]) == (20, 8 * 7 - 20)
    count, total, outer = stats["moments"]
    assert count == 20
    np.testing.assert_allclose(total, everything.sum(axis=0), atol=1e-4)
    np.testing.assert_allclose(outer, everything.T.astype(float) @ everything, atol=1e-4)


def test_longest_histories_are_cut_to_a_common_length_that_just_fits():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 40, size=rng.integers(1, 30))
        budget = float(rng.integers(100, 40 * 30 * 100)) + 400 * len(lengths) * 8 / 7
        longest = longest_history(lengths, budget, 100)
        available = budget * 7 / 8 - 400 * len(lengths)
        assert longest == 1 or np.minimum(lengths, longest).sum() * 100 <= available
        assert longest >= lengths.max() or np.minimum(lengths, longest + 1).sum() * 100 > available


def test_a_budget_takes_the_oldest_vectors_of_the_longest_histories():
    config = MemoryConfig(budget_gib=20_000 / 2**30)
    shard = MemoryShard(config)
    few, many = batches(1, 30)[0], batches(20, 30, seed=1)
    shard.remember(["few"] * 30, few)
    for batch in many:
        shard.remember(["many"] * 30, batch)
        shard.recluster()
        assert shard.bytes_used <= 20_000
    assert len(shard.labels("few")) == 30
    kept = np.concatenate(many)[-len(shard.labels("many")) :]
    assert partition(shard.labels("many")) == partition(fresh_labels(kept, config))
    assert shard.stats()["evicted_vectors"] == 600 - len(kept)


def test_a_budget_too_small_for_all_keys_forgets_those_not_seen_for_longest():
    shard = MemoryShard(MemoryConfig(budget_gib=10_000 / 2**30))
    batch = batches(1, 1)[0]
    for number in range(100):
        shard.remember([f"problem {number}"], batch)
        shard.recluster()
    assert shard.bytes_used <= 10_000
    assert len(shard.labels("problem 99")) == 1 and len(shard.labels("problem 0")) == 0


def test_a_key_that_outgrows_the_short_record_goes_on_as_before(monkeypatch):
    monkeypatch.setattr("meds_megatron.memory.history.SHORT", 20)
    config, everything = MemoryConfig(window=40), np.empty((0, 6), np.float32)
    shard = MemoryShard(config)
    for batch in batches(9, 7):
        shard.remember(["problem"] * 7, batch)
        shard.recluster()
        everything = np.concatenate([everything, batch])[-40:]
        assert partition(shard.labels("problem")) == partition(fresh_labels(everything, config))
