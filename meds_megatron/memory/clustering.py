"""Cluster labels of one key: of its stored vectors, by HDBSCAN, and of new ones, by a vote of their neighbours."""

import warnings
from dataclasses import dataclass

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.memory.condensed_tree import NOISE, flat_clusters
from meds_megatron.memory.spanning_tree import compiled, distance, grow_spanning_tree

EQUAL_DISTANCES = 1e12
"""Cosine distances that agree to one part in this many count as equal, so that rounding does not decide a vote."""


@dataclass(frozen=True)
class Clustering:
    """Clusters of N vectors: labels [N] int64 (-1 is noise, the others are those of the hdbscan package), the edges
    [N-1, 2] int32 of their spanning tree (no rows where none is kept), and whether the package itself fitted them."""

    labels_N: np.ndarray
    ends_M2: np.ndarray
    refitted: bool


def cluster(points_NF: np.ndarray, ends_M2: np.ndarray, config: MemoryConfig) -> Clustering:
    """Cluster unit vectors [N, F] float64, oldest first; `ends_M2` is the spanning tree of the first M + 1 of them.

    With min_samples = 1 the mutual reachability distance is the plain distance, so the tree of old and new points grows
    out of the old one. Every other setting is a fresh fit of these points by the hdbscan package. Points without
    features (F = 0) are all alike: they are one cluster. With `method: answer` the points are codes of answers, and
    equal ones are a cluster, even a single one.
    """
    points = len(points_NF)
    no_tree_02 = np.empty((0, 2), np.int32)
    if config.method == "single" or points_NF.shape[1] == 0:
        return Clustering(np.zeros(points, np.int64), no_tree_02, refitted=False)
    if config.method == "answer":
        return Clustering(equal_rows(points_NF), no_tree_02, refitted=False)
    if points < 2:
        return Clustering(np.full(points, NOISE, np.int64), no_tree_02, refitted=False)
    if config.min_samples != 1:
        return Clustering(refit(points_NF, config), no_tree_02, refitted=True)
    ends_M2, lengths_M = grow_spanning_tree(points_NF, ends_M2)
    labels_N = flat_clusters(ends_M2, lengths_M, config.min_cluster_size, config.allow_single_cluster)
    return Clustering(labels_N, ends_M2, refitted=False)


def equal_rows(points_NF: np.ndarray) -> np.ndarray:
    """Labels [N] int64, from 0 on in the order of appearance: the same for equal points."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(point_F.tobytes(), len(numbers)) for point_F in points_NF], dtype=np.int64)


def labels_of_equals(queries_QF: np.ndarray, points_NF: np.ndarray, labels_N: np.ndarray, otherwise: int) -> np.ndarray:
    """Label [Q] int64 of the points that equal each query, `otherwise` where none does. Both are of one type."""
    labels = {point_F.tobytes(): label for point_F, label in zip(points_NF, labels_N, strict=True)}
    return np.array([labels.get(query_F.tobytes(), otherwise) for query_F in queries_QF], dtype=np.int64)


def refit(points_NF: np.ndarray, config: MemoryConfig) -> np.ndarray:
    """Labels [N] of the hdbscan package for unit vectors [N, F], N >= 2."""
    # With scikit-learn and SciPy it takes longer to import than the rest of the memory, and most settings do without.
    import hdbscan

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
        return np.asarray(model.fit(points_NF).labels_, dtype=np.int64)


@compiled
def vote(
    queries_QF: np.ndarray, points_NF: np.ndarray, labels_N: np.ndarray, neighbours: int
) -> tuple[np.ndarray, np.ndarray]:
    """Label [Q] int64 that most of each query's `neighbours` nearest points carry, by cosine distance, and the index
    [Q] of the nearest.

    All vectors are of unit length or zero. Of equally near points the older (smaller index) is taken; a tied vote goes
    to the smallest label, as published. Labels are numbered as by the hdbscan package (always where all vectors differ;
    numbers of 5 % of partitions differ where many are equal, which changed none of 12,000 votes). With fewer points
    than `neighbours` all of them vote.
    """
    queries, features = queries_QF.shape
    points = points_NF.shape[0]
    voters = min(neighbours, points)
    nearest = np.empty(voters, np.float64)
    voter_points = np.empty(voters, np.int64)
    winners = np.empty(queries, np.int64)
    nearest_points = np.empty(queries, np.int64)
    for query in range(queries):
        nearest[:] = np.inf
        for point in range(points):
            cosine = 0.0
            for feature in range(features):
                cosine += queries_QF[query, feature] * points_NF[point, feature]
            separation = np.floor((1.0 - cosine) * EQUAL_DISTANCES + 0.5)
            if separation >= nearest[voters - 1]:
                continue
            place = voters - 1
            while place > 0 and nearest[place - 1] > separation:
                nearest[place] = nearest[place - 1]
                voter_points[place] = voter_points[place - 1]
                place -= 1
            nearest[place] = separation
            voter_points[place] = point
        best_label, best_votes = labels_N[voter_points[0]], 0
        for voter in voter_points:
            label, votes = labels_N[voter], 0
            for other in voter_points:
                votes += labels_N[other] == label
            if votes > best_votes or (votes == best_votes and label < best_label):
                best_label, best_votes = label, votes
        winners[query] = best_label
        nearest_points[query] = voter_points[0]
    return winners, nearest_points


@compiled
def beyond_reach(
    queries_QF: np.ndarray, nearest_Q: np.ndarray, points_NF: np.ndarray, labels_N: np.ndarray, ends_M2: np.ndarray
) -> np.ndarray:
    """Whether each query [Q] is farther from its nearest point than that point's cluster reaches (see
    `MemoryConfig.novelty`); never where the nearest point is noise. `ends_M2` is the points' spanning tree."""
    reach_C = np.full(labels_N.max() + 1, np.inf)
    for edge in range(len(ends_M2)):
        one, other = ends_M2[edge]
        if labels_N[one] != labels_N[other]:
            length = distance(points_NF[one], points_NF[other])
            for label in (labels_N[one], labels_N[other]):
                if label != NOISE:
                    reach_C[label] = min(reach_C[label], length)
    beyond_Q = np.zeros(len(queries_QF), np.bool_)
    for query in range(len(queries_QF)):
        label = labels_N[nearest_Q[query]]
        if label != NOISE:
            beyond_Q[query] = distance(queries_QF[query], points_NF[nearest_Q[query]]) > reach_C[label]
    return beyond_Q


def warm_up(config: MemoryConfig) -> None:
    """Compile the loops now (seconds, once per machine), and import what `config` needs, rather than in the middle of a
    step."""
    if config.min_samples != 1:
        import hdbscan  # noqa: F401
    points_NF = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    clustering = cluster(points_NF, np.empty((0, 2), np.int32), MemoryConfig())
    _, nearest_N = vote(points_NF, points_NF, clustering.labels_N, 3)
    beyond_reach(points_NF, nearest_N, points_NF, clustering.labels_N, clustering.ends_M2)
