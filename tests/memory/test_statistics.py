import numpy as np
import pytest

from meds_megatron.config import MemoryConfig
from meds_megatron.memory import MemoryShard, shard_of, step_metrics


def test_metrics_of_many_shards_are_those_of_one():
    rng = np.random.default_rng(0)
    one, many = MemoryShard(MemoryConfig()), [MemoryShard(MemoryConfig()) for _ in range(3)]
    everything = []
    for _ in range(3):
        keys = [f"problem {number}" for number in rng.integers(10, size=80)]
        fingerprints = rng.normal(size=(80, 20)) * np.linspace(0.1, 3, 20) + 30
        everything.append(fingerprints[:, -14:].astype(np.float32))
        owners = np.array([shard_of(key, 3) for key in keys])
        for owner, shard in [(owners >= 0, one), *((owners == rank, shard) for rank, shard in enumerate(many))]:
            mine = [key for key, is_mine in zip(keys, owner, strict=True) if is_mine]
            shard.lookup(mine, fingerprints[owner])
            shard.remember(mine, fingerprints[owner])
            shard.recluster()
    alone, together = step_metrics([one.stats()]), step_metrics([shard.stats() for shard in many])
    for name in alone:
        if "_seconds_" not in name:
            assert together[name] == pytest.approx(alone[name]), name
    assert alone["memory/keys"] == 10 and alone["memory/vectors"] == 240
    assert 0 < alone["memory/noise_share"] < 1 and 0 < alone["memory/hit_share"] < 2 / 3
    eigenvalues = np.linalg.eigvalsh(np.cov(np.concatenate(everything).T))
    assert alone["memory/top_eigenvalue_share"] == pytest.approx(eigenvalues[-1] / eigenvalues.sum(), rel=1e-5)


def test_counts_start_again_after_each_report():
    shard = MemoryShard(MemoryConfig(method="single"))
    fingerprints = np.random.default_rng(0).normal(size=(9, 14))
    shard.remember(["problem"] * 9, fingerprints)
    shard.recluster()
    shard.lookup(["problem"] * 9, fingerprints)
    first, second = shard.stats(), shard.stats()
    assert (first["lookups"], first["hits"], first["saturated"], first["size_sum"]) == (9, 9, 9, 81)
    assert (second["lookups"], second["hits"]) == (0, 0)
    assert second["vectors"] == 9 and second["clusters"] == 1


def test_an_empty_memory_has_metrics():
    metrics = step_metrics([MemoryShard(MemoryConfig()).stats() for _ in range(2)])
    assert set(metrics.values()) == {0.0}
