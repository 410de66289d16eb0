"""The stored vectors of one key, and how many of them fit into a memory budget."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.memory.clustering import cluster
from meds_megatron.memory.condensed_tree import NOISE
from meds_megatron.memory.features import unit_vectors

KEY_BYTES = 400
"""Memory of a key besides its records: its name, its entry in the shard, its KeyHistory and the array's header."""

SHORT = 2**16
"""A key with fewer vectors than this takes the short record."""

BUDGET_SHARE = 7 / 8
"""Share of the budget that is left in use once it was exceeded, so that evictions are rare."""


@cache  # One dtype for all keys: an own one would cost each key a kilobyte.
def record_type(features: int, long: bool = False) -> np.dtype:
    """Type of a stored vector: its features, the step it was remembered in, its label, and (in every record but a key's
    first) one edge of the key's spanning tree. One array of these is all that a key needs."""
    label, end = ("<i4", "<u4") if long else ("<i2", "<u2")
    return np.dtype([("vector", "<f4", (features,)), ("step", "<i4"), ("label", label), ("ends", end, (2,))])


def new_records(features_NF: np.ndarray, steps_N: np.ndarray | int) -> np.ndarray:
    """Records [N] of vectors not clustered yet, oldest first."""
    records_N = np.zeros(len(features_NF), record_type(features_NF.shape[1]))
    records_N["vector"] = features_NF
    records_N["step"] = steps_N
    return records_N


@dataclass(frozen=True, slots=True)
class KeyHistory:
    """The clustered vectors of a key, oldest first. Never changed in place, so another thread sees it complete."""

    records_N: np.ndarray
    clusters: int
    noise: int

    def __len__(self) -> int:
        return len(self.records_N)

    @property
    def features(self) -> int:
        """Length of a vector; 0 where the key is of responses without an answer."""
        return self.records_N["vector"].shape[1]

    @property
    def labels_N(self) -> np.ndarray:
        return self.records_N["label"].astype(np.int64)

    @property
    def ends_M2(self) -> np.ndarray:
        """Edges of the vectors' spanning tree; of use only where one is kept (see `cluster`)."""
        return self.records_N["ends"][1:].astype(np.int32)

    def units_NF(self) -> np.ndarray:
        return unit_vectors(self.records_N["vector"])

    def totals(self) -> dict[str, int]:
        """The key's part in the shard's statistics."""
        size = self.records_N.nbytes + KEY_BYTES
        if self.features == 0:
            return {"no_answer": len(self), "bytes": size}
        return {
            "keys": 1,
            "vectors": len(self),
            "clusters": self.clusters,
            "noise_vectors": self.noise,
            "bytes": size,
        }


def extend(known_N: np.ndarray, added_N: np.ndarray, keep: int | None, config: MemoryConfig) -> tuple[KeyHistory, bool]:
    """Cluster a key's clustered records and new ones, of all of which the newest `keep` stay; also whether that took a
    fresh fit. Removing a vector can change every edge of the spanning tree, so the tree is then built from scratch."""
    ends_M2 = known_N["ends"][1:].astype(np.int32)
    length = len(known_N) + len(added_N)
    excess = 0 if keep is None else max(length - keep, 0)
    record = record_type(known_N["vector"].shape[1], length - excess >= SHORT)
    records_N = np.concatenate([known_N, added_N], dtype=record, casting="same_kind")
    if excess:
        records_N, ends_M2 = records_N[excess:].copy(), ends_M2[:0]
    points_NF = records_N["vector"] if config.method == "answer" else unit_vectors(records_N["vector"])
    clustering = cluster(points_NF, ends_M2, config)
    records_N["label"] = clustering.labels_N
    if len(clustering.ends_M2):
        records_N["ends"][1:] = clustering.ends_M2
    clusters = int(clustering.labels_N.max(initial=NOISE)) + 1
    noise = int(np.count_nonzero(clustering.labels_N == NOISE))
    return KeyHistory(records_N, clusters, noise), clustering.refitted


def keys_that_fit(budget_bytes: float, record_bytes: int) -> int:
    """Number of keys with one vector each that fit into BUDGET_SHARE of the budget."""
    return int(budget_bytes * BUDGET_SHARE // (KEY_BYTES + record_bytes))


def longest_history(lengths_K: np.ndarray, budget_bytes: float, record_bytes: int) -> int:
    """The greatest length to which histories can be cut so that all fit into BUDGET_SHARE of the budget; at least 1.

    Cutting the longest first costs the least: a penalty is at its most from seven vectors of a cluster on.
    """
    available = (budget_bytes * BUDGET_SHARE - len(lengths_K) * KEY_BYTES) // record_bytes
    ascending_K = np.sort(np.asarray(lengths_K, dtype=np.int64))
    below_K = np.concatenate([[0], np.cumsum(ascending_K)[:-1]])
    longer_K = len(ascending_K) - np.arange(len(ascending_K))
    limits_K = (available - below_K) // longer_K
    fits_K = limits_K < ascending_K
    return max(int(limits_K[np.argmax(fits_K)]) if fits_K.any() else int(ascending_K[-1]), 1)
