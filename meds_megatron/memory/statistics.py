"""Statistics of a shard, and the metrics of a step that those of all shards add up to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SATURATED_SIZE = 7
"""Size of a cluster from which on a penalty no longer grows: ln(7 + 1) > 2."""


class Moments(NamedTuple):
    """Count, sum and outer-product sum of the stored vectors: enough for their covariance, and shards add up."""

    vectors: int
    sum_F: np.ndarray
    outer_FF: np.ndarray

    @classmethod
    def empty(cls, features: int) -> "Moments":
        return cls(0, np.zeros(features), np.zeros((features, features)))

    def plus(self, vectors_NF: np.ndarray, sign: int = 1) -> "Moments":
        """The moments with these vectors added, or removed where `sign` is -1."""
        vectors_NF = vectors_NF.astype(np.float64)
        return Moments(
            self.vectors + sign * len(vectors_NF),
            self.sum_F + sign * vectors_NF.sum(axis=0),
            self.outer_FF + sign * (vectors_NF.T @ vectors_NF),
        )


def top_eigenvalue_share(count: int, sum_F: np.ndarray, outer_FF: np.ndarray) -> float:
    """Largest eigenvalue of the covariance over the sum of all: 1 when all vectors lie on a line; 0 of no vectors."""
    if count < 2:
        return 0.0
    mean_F = sum_F / count
    eigenvalues_F = np.linalg.eigvalsh(outer_FF / count - np.outer(mean_F, mean_F))
    total = eigenvalues_F.sum()
    return float(eigenvalues_F[-1] / total) if total > 1e-9 * max(1.0, np.trace(outer_FF) / count) else 0.0


@dataclass
class StepCounts:
    """Counts and times of a shard since its last `stats()`."""

    lookups: int = 0
    hits: int = 0
    """Lookups whose vote went to a cluster (not to noise) of a known key."""
    size_sum: int = 0
    saturated: int = 0
    reclustered_keys: int = 0
    fresh_fits: int = 0
    """Keys that the hdbscan package fitted from scratch, because of the settings."""
    evicted_vectors: int = 0
    lookup_seconds: float = 0.0
    recluster_seconds: float = 0.0

    def count_lookups(self, sizes_N: np.ndarray, labels_N: np.ndarray) -> None:
        self.lookups += len(sizes_N)
        self.hits += int(np.count_nonzero(labels_N >= 0))
        self.size_sum += int(sizes_N.sum())
        self.saturated += int(np.count_nonzero(sizes_N >= SATURATED_SIZE))


def step_metrics(shards: Sequence[dict]) -> dict[str, float]:
    """Metrics `memory/...` of a step from every shard's `stats()`: sums and shares over all shards, and the times of
    each shard and of the slowest, which the others wait for.

    Keys, vectors, clusters and noise are of fingerprints; `memory/no_answer` counts the remembered responses without
    one. Lookups are of both, since both are penalised.
    """

    def total(name: str) -> float:
        return sum(shard[name] for shard in shards)

    def share(part: str, whole: str) -> float:
        return total(part) / total(whole) if total(whole) else 0.0

    moments = [shard["moments"] for shard in shards if shard["vectors"]]
    sums = [sum(part[1:], part[0]) for part in zip(*moments, strict=True)]
    metrics = {
        "memory/keys": total("keys"),
        "memory/vectors": total("vectors"),
        "memory/clusters": total("clusters"),
        "memory/noise_share": share("noise_vectors", "vectors"),
        "memory/hit_share": share("hits", "lookups"),
        "memory/lookup_size_mean": share("size_sum", "lookups"),
        "memory/saturated_share": share("saturated", "lookups"),
        "memory/top_eigenvalue_share": top_eigenvalue_share(*sums) if sums else 0.0,
        "memory/no_answer": total("no_answer"),
        "memory/fresh_fits": total("fresh_fits"),
        "memory/evicted_vectors": total("evicted_vectors"),
        "memory/bytes": total("bytes"),
    }
    for name in ("lookup_seconds", "recluster_seconds"):
        metrics[f"memory/{name}_max"] = max((shard[name] for shard in shards), default=0.0)
        metrics |= {f"memory/{name}_shard_{number}": shard[name] for number, shard in enumerate(shards)}
    return metrics
