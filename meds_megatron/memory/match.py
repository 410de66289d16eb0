"""Result of a lookup in the error memory, and the shard of a key: all that a caller of shards in other processes
needs."""

import hashlib
from dataclasses import dataclass

import numpy as np

UNKNOWN = -2
"""Label of a fingerprint whose key was never clustered, or that is new with `memory.novelty`, and of a new answer with
`memory.method: answer`."""


def shard_of(key: str, shards: int) -> int:
    """Index in [0, shards) of the shard that owns `key`: the same in every process, on every machine, in every run."""
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % shards


@dataclass(frozen=True)
class Match:
    """Label that won each fingerprint's vote and size of that cluster, [N] int64 each."""

    labels_N: np.ndarray
    sizes_N: np.ndarray
