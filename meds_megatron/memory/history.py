"""What one key remembers."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.memory.clustering import cluster
from meds_megatron.memory.features import unit_vectors
from meds_megatron.memory.hierarchy import NOISE

KEY_BYTES = 400
"""What a key costs besides its records: its name, its entry in the shard, this object and the array's header."""


SHORT = 2**16
"""A key with fewer vectors than this takes the short record."""


def record_type(features: int, vectors: int = 0) -> np.dtype:
    """A stored vector: its features, the step it was remembered in, its label, and (in every record but a key's first)
    one edge of the key's spanning tree. One array of these is all that a key needs; `vectors` is its length."""
    return _record_type(features, vectors >= SHORT)


@cache
def _record_type(features: int, long: bool) -> np.dtype:
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
    """The clustered vectors of a key, oldest first. Never changed in place: whoever holds one sees it whole."""

    records_N: np.ndarray
    dropped: int
    """Older vectors that bounds have removed; a vector's number in the key's life is this plus its place here."""
    clusters: int
    noise: int

    def __len__(self) -> int:
        return len(self.records_N)

    @property
    def features(self) -> int:
        """Numbers in a vector; 0 where the key is of answers without a fingerprint."""
        return self.records_N["vector"].shape[1]

    @property
    def bytes(self) -> int:
        return self.records_N.nbytes + KEY_BYTES

    @property
    def labels_N(self) -> np.ndarray:
        return self.records_N["label"].astype(np.int64)

    def units_NF(self) -> np.ndarray:
        return unit_vectors(self.records_N["vector"])


def extend(
    history: KeyHistory | None, added_N: np.ndarray, keep: int | None, config: MemoryConfig
) -> tuple[KeyHistory, bool]:
    """The history with new records, of all of which the newest `keep` stay, clustered; and whether that took a fresh
    fit by the package. Removing a vector can change every edge of the tree, so it is then grown from nothing."""
    dropped, known_N = (0, added_N[:0]) if history is None else (history.dropped, history.records_N)
    ends_M2 = known_N["ends"][1:].astype(np.int32)
    length = len(known_N) + len(added_N)
    excess = 0 if keep is None else max(length - keep, 0)
    if excess:
        dropped += excess
        ends_M2 = ends_M2[:0]
    features = known_N["vector"].shape[1]
    records_N = np.concatenate([known_N, added_N], dtype=record_type(features, length - excess), casting="same_kind")
    records_N = records_N[excess:].copy() if excess else records_N
    clustering = cluster(unit_vectors(records_N["vector"]), ends_M2, config)
    records_N["label"] = clustering.labels_N
    if len(clustering.ends_M2):
        records_N["ends"][1:] = clustering.ends_M2
    clusters = int(clustering.labels_N.max(initial=NOISE)) + 1
    noise = int(np.count_nonzero(clustering.labels_N == NOISE))
    return KeyHistory(records_N, dropped, clusters, noise), clustering.fresh_fit
