"""Reference implementation of the memory: a fit from scratch for every key, a vote of its own for every sample."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

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
    import hdbscan

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


@dataclass
class Definition:
    """HDBSCAN by its definition, with min_samples = 1: every set of points is split where its longest edge is removed.

    Of edges of equal length that of the older newer end, then of the older older end, is the shorter; equal vectors are
    one point, which nothing splits. `labels` number clusters by their oldest member.
    """

    vectors_NF: np.ndarray
    config: MemoryConfig
    labels: list[int] = field(init=False)
    ambiguous: set[str] = field(default_factory=set)
    """Why the package's answer depends on rounding or on the order of its edges; empty where it does not."""

    def __post_init__(self):
        points = len(self.vectors_NF)
        self.labels = [-1] * points
        if points < 2:
            return
        self._halves = self._single_linkage()
        everything = frozenset(range(points))
        left: dict[int, float] = {}
        _, chosen = self._walk(everything, 0.0, left, is_root=True)
        if chosen == [everything]:
            chosen = [frozenset(point for point, density in left.items() if density == max(left.values()))]
        for number, members in enumerate(sorted(chosen, key=min)):
            for point in members:
                self.labels[point] = number

    def _single_linkage(self) -> dict[frozenset, tuple[float, frozenset, frozenset]]:
        """Merge of every set that single linkage makes: the length that joined it, and its halves (Kruskal, all
        pairs)."""
        points_NF = units(self.vectors_NF)
        newer, older = np.tril_indices(len(points_NF), -1)
        squares = (points_NF[newer] - points_NF[older]) ** 2
        lengths = np.sqrt(np.cumsum(squares, axis=1)[:, -1])
        lengths = 8193.0 * lengths - (8193.0 * lengths - lengths)
        of_point = [frozenset([point]) for point in range(len(points_NF))]
        halves, joined = {}, []
        for pair in np.lexsort((older, newer, lengths)):
            one, other = of_point[newer[pair]], of_point[older[pair]]
            if one is not other:
                length = lengths[pair] if lengths[pair] > 1e-12 else 0.0
                both = one | other
                halves[both] = (length, one, other)
                joined.append(length)
                for point in both:
                    of_point[point] = both
                if 0.0 < lengths[pair] <= 1e-12:
                    self.ambiguous.add("nearly equal vectors")
        positive = np.array([length for length in joined if length])
        if (np.diff(positive) <= 1e-12).any():
            self.ambiguous.add("equal lengths")
        return halves

    def _walk(self, members: frozenset, birth: float, left: dict[int, float], is_root: bool = False):
        """Stability of the most stable selection in a cluster, and the member sets of that selection. `left` gets the
        density at which each point leaves this cluster."""
        cluster, own, children, smallest = members, 0.0, [], self.config.min_cluster_size
        while members:
            length, *parts = self._halves.get(members, (0.0, members))
            density = 1.0 / length if length else np.inf
            large = [part for part in parts if len(part) >= smallest] if length else []
            gone = members if len(large) != 1 else members - large[0]
            own += (density - birth) * len(gone)
            left.update(dict.fromkeys(gone, density))
            if len(large) == 2:
                children = [self._walk(part, density, {}) for part in large]
            if length == 0 and is_root and not self.config.allow_single_cluster and len(members) >= 2 * smallest:
                self.ambiguous.add("equal vectors that never split")
            members = large[0] if len(large) == 1 else None
        below = sum(stability for stability, _ in children)
        if children and np.isfinite(max(own, below)) and abs(own - below) <= 1e-5 * max(own, below):
            self.ambiguous.add("equal stability")
        if below > own * (1 + 1e-6) or (is_root and not self.config.allow_single_cluster):
            return below, [chosen for _, selection in children for chosen in selection]
        return own, [cluster]


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

    def ambiguous(self) -> set[str]:
        """Why the partition differs from that of a fit by the package; empty where it must not."""
        if self.config.min_samples != 1 or self.config.method == "single" or not self.vectors:
            return set()
        return Definition(np.stack(self.vectors), self.config).ambiguous
