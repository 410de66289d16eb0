"""A memory shard as an actor: it holds the fingerprints of a step until it hears which of them to remember."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meds_megatron.actor.messages import FingerprintPiece
from meds_megatron.config import MemoryConfig
from meds_megatron.memory.shard import MemoryShard
from meds_megatron.trainer.memory_row import UNBOXED


@dataclass(frozen=True)
class _Entry:
    key: str
    fingerprint_L: np.ndarray
    """Of no layers where the response has no fingerprint."""


NO_FINGERPRINT = np.empty(0, dtype=np.float32)


class StepMemory:
    """Knows the responses of a step by their numbers, and takes them in the order of these: which rank made which
    fingerprint, and in how many pieces they come, changes nothing."""

    def __init__(self, config: MemoryConfig, rank: int, shards: int):
        self._shard = MemoryShard(config, rank, shards)
        self._entries: dict[int, _Entry] = {}

    def lookup(self, rows: Sequence[int], keys: Sequence[str], *pieces: FingerprintPiece) -> np.ndarray:
        """How many earlier mistakes lie in the cluster of each of `rows`, int64 [N].

        Raises KeyError when a row is in none of the pieces, unless its key is of answers without a fingerprint.
        """
        found = {
            row: fingerprint_L
            for piece in pieces
            for row, fingerprint_L in zip(piece.rows_N.tolist(), piece.fingerprints_NL, strict=True)
        }
        entries = {
            row: _Entry(key, NO_FINGERPRINT if key.endswith(UNBOXED) else found[row])
            for row, key in zip(rows, keys, strict=True)
        }
        self._entries |= entries
        sizes_N = np.zeros(len(rows), dtype=np.int64)
        for places, chosen, fingerprints_NL in _by_layers(list(entries.values())):
            sizes_N[places] = self._shard.lookup(chosen, fingerprints_NL)
        return sizes_N

    def remember(self, rows: Sequence[int]) -> None:
        """Stores `rows` of what was looked up since the last call, forgets the others and ends the shard's step."""
        entries = [self._entries[row] for row in sorted(rows)]
        self._entries = {}
        for _, keys, fingerprints_NL in _by_layers(entries):
            self._shard.remember(keys, fingerprints_NL)
        self._shard.recluster()

    def stats(self) -> dict:
        return self._shard.stats()


def _by_layers(entries: list[_Entry]) -> list[tuple[list[int], list[str], np.ndarray]]:
    """Places, keys and fingerprints [N, L] of the entries with a fingerprint, and the same of those without."""
    parts = []
    for layers in sorted({len(entry.fingerprint_L) for entry in entries}):
        places = [place for place, entry in enumerate(entries) if len(entry.fingerprint_L) == layers]
        keys = [entries[place].key for place in places]
        parts.append((places, keys, np.stack([entries[place].fingerprint_L for place in places])))
    return parts
