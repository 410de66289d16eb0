"""Reference implementation of the memory: a fit from scratch for every key, a vote of its own for every sample."""

import warnings
from collections import Counter

import hdbscan
import numpy as np

from meds_megatron.config import MemoryConfig


def units(vectors_NF: np.ndarray) -> np.ndarray:
    vectors_NF = np.asarray(vectors_NF, dtype=np.float64)
    norms = np.linalg.norm(vectors_NF, axis=1, keepdims=True)
    return vectors_NF / np.where(norms == 0, 1, norms)


def features(fingerprints_NL: np.ndarray, config: MemoryConfig) -> np.ndarray:
    fingerprints_NL = np.asarray(fingerprints_NL, dtype=np.float32)
    if config.layer_diff:
        fingerprints_NL = fingerprints_NL[:, 1:] - fingerprints_NL[:, :-1]
    return fingerprints_NL[:, -config.last_n_layers :]


def fresh_labels(vectors_NF: np.ndarray, config: MemoryConfig) -> np.ndarray:
    if config.method == "single":
        return np.zeros(len(vectors_NF), int)
    if len(vectors_NF) < 2:
        return np.full(len(vectors_NF), -1)
    # The package's default builds a spanning tree that is only nearly minimal; the exact one is asked for.
    model = hdbscan.HDBSCAN(
        min_cluster_size=config.min_cluster_size,
        min_samples=config.min_samples,
        metric="euclidean",
        cluster_selection_method="eom",
        allow_single_cluster=config.allow_single_cluster,
        approx_min_span_tree=False,
        core_dist_n_jobs=1,
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return model.fit(units(vectors_NF)).labels_


def partition(labels) -> list[int]:
    """Labels renumbered in order of appearance, noise kept: equal for equal partitions."""
    numbers: dict[int, int] = {}
    return [-1 if label == -1 else numbers.setdefault(int(label), len(numbers)) for label in labels]


def vote(history_NF: np.ndarray, labels: list[int], query_F: np.ndarray, neighbours: int) -> int:
    """The label that most of the nearest vectors carry; older first among equally near, smallest label of a tie."""
    query = units(query_F[None])[0]
    # Summed in the order of the layers; distances that differ by rounding only are equal.
    cosines = np.cumsum(units(history_NF) * query, axis=1)[:, -1]
    nearest = np.argsort(np.floor((1.0 - cosines) * 1e12 + 0.5), kind="stable")[:neighbours]
    votes = Counter(labels[place] for place in nearest)
    most = max(votes.values())
    return min(label for label, count in votes.items() if count == most)


class PlainMemory:
    """One key's memory that keeps nothing but the vectors from step to step."""

    def __init__(self, config: MemoryConfig):
        self.config = config
        self.vectors: list[np.ndarray] = []
        self.labels: list[int] = []

    def size(self, fingerprint_L: np.ndarray) -> int:
        if not self.vectors:
            return 0
        query = features(fingerprint_L[None], self.config)[0]
        label = vote(np.stack(self.vectors), self.labels, query, self.config.knn)
        if label == -1 and self.config.noise == "ignore":
            return 0
        return self.labels.count(label)

    def remember(self, fingerprints_NL: np.ndarray) -> None:
        if len(fingerprints_NL):
            self.vectors += list(features(fingerprints_NL, self.config))
            if self.config.window is not None:
                self.vectors = self.vectors[-self.config.window :]
            self.labels = partition(fresh_labels(np.stack(self.vectors), self.config))
