"""Clusters of one key's vectors: grown where that is exact, fitted afresh where it is not."""

import warnings
from dataclasses import dataclass

import hdbscan
import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.memory.hierarchy import NOISE, flat_clusters
from meds_megatron.memory.neighbours import vote
from meds_megatron.memory.spanning_tree import grow_spanning_tree


@dataclass(frozen=True)
class Clustering:
    """Labels [N] int64 (-1 is noise, clusters are numbered by their oldest vector), the ends [N-1, 2] int32 of the
    spanning tree to grow from (no rows where none is kept), and whether the package had to fit the key."""

    labels_N: np.ndarray
    ends_M2: np.ndarray
    fresh_fit: bool


def cluster(points_NF: np.ndarray, ends_M2: np.ndarray, config: MemoryConfig) -> Clustering:
    """Cluster unit vectors [N, F] float64, oldest first, of whose first M + 1 the spanning tree `ends_M2` is known.

    With min_samples = 1 the mutual reachability distance is the plain distance, so the tree of old and new points grows
    out of the old one. Every other setting, and every tie, is a fresh fit of these points by the hdbscan package.
    Points without features (F = 0) cannot be told apart: they are one cluster.
    """
    points = len(points_NF)
    no_tree_02 = np.empty((0, 2), np.int32)
    if config.method == "single" or points_NF.shape[1] == 0:
        return Clustering(np.zeros(points, np.int64), no_tree_02, fresh_fit=False)
    if points < 2:
        return Clustering(np.full(points, NOISE, np.int64), no_tree_02, fresh_fit=False)
    if config.min_samples != 1:
        return Clustering(fit_afresh(points_NF, config), no_tree_02, fresh_fit=True)
    ends_M2, lengths_M = grow_spanning_tree(points_NF, ends_M2)
    labels_N = flat_clusters(ends_M2, lengths_M, config.min_cluster_size, config.allow_single_cluster)
    if labels_N is None:
        return Clustering(fit_afresh(points_NF, config), ends_M2, fresh_fit=True)
    return Clustering(labels_N, ends_M2, fresh_fit=False)


def warm_up() -> None:
    """Compile the loops now (seconds, once per machine) rather than in the middle of a step."""
    points_NF = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    cluster(points_NF, np.empty((0, 2), np.int32), MemoryConfig())
    vote(points_NF, points_NF, np.zeros(3, np.int64), 3)


def fit_afresh(points_NF: np.ndarray, config: MemoryConfig) -> np.ndarray:
    """Labels [N] of the hdbscan package for unit vectors [N, F], renumbered by each cluster's oldest vector; N >= 2."""
    model = hdbscan.HDBSCAN(
        min_cluster_size=config.min_cluster_size,
        min_samples=config.min_samples,
        metric="euclidean",
        cluster_selection_method="eom",
        allow_single_cluster=config.allow_single_cluster,
        # The package's default takes a tree that is not quite minimal, which changes about one partition in a thousand.
        approx_min_span_tree=False,
        core_dist_n_jobs=1,
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Duplicates have infinite density, which the package handles but warns about.
        warnings.simplefilter("ignore")
        return number_by_age(model.fit(points_NF).labels_)


def number_by_age(labels_N: np.ndarray) -> np.ndarray:
    """The same partition with clusters numbered 0, 1, ... by their first member; -1 stays -1."""
    labels_N = np.asarray(labels_N, dtype=np.int64)
    values, first, inverse = np.unique(labels_N, return_index=True, return_inverse=True)
    clusters = values != NOISE
    numbers = np.full(len(values), NOISE, np.int64)
    numbers[clusters] = np.argsort(np.argsort(first[clusters]))
    return numbers[inverse]
