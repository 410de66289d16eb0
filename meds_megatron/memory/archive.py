"""Which vectors of a shard are on disk already, so that a save writes only the others."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meds_megatron.memory import storage
from meds_megatron.memory.history import KeyHistory


class Archive:
    """The segments of a shard as its last save or load left them, and what changed since."""

    def __init__(self):
        self._segments: list[storage.Segment] = []
        self._directory: Path | None = None
        self._files: set[str] = set()
        self._changed: dict[str, int] = {}
        """Keys that changed, with the number of their first vector that is in no segment."""

    def note(self, key: str, first_new: int) -> None:
        """A key changed: its vectors from number `first_new` on are new, or older ones were dropped."""
        self._changed.setdefault(key, first_new)

    def start_anew(self) -> None:
        """No segment counts any more: the next save writes everything."""
        self._segments = []

    def resume_from(self, directory: Path, manifest: storage.Manifest) -> None:
        """The shard is exactly what this manifest says."""
        self._segments, self._directory, self._changed = list(manifest.segments), directory, {}
        self._files = _files_of(manifest)

    def save(
        self,
        directory: Path,
        histories: dict[str, KeyHistory],
        pending: dict[str, list[np.ndarray]],
        manifest: storage.Manifest,
    ) -> None:
        """Write what is new, then the manifest with its segments filled in.

        Everything is written anew when less than half of what the segments hold is alive, or one of them is gone.
        """
        directory.mkdir(parents=True, exist_ok=True)
        alive = sum(len(history) for history in histories.values())
        worthwhile = 2 * alive >= sum(segment.vectors for segment in self._segments)
        if not (self._segments and worthwhile and storage.carry_over(self._segments, self._directory, directory)):
            self._segments = []
            self._changed = {key: history.dropped for key, history in histories.items()}
        new = storage.write_parts(directory, self._new_parts(histories))
        manifest.segments = [*self._segments, new] if new else list(self._segments)
        manifest.pending = storage.write_parts(directory, _pending_parts(pending))
        storage.write_manifest(directory, manifest)
        if directory == self._directory:
            for name in self._files - _files_of(manifest):
                (directory / name).unlink(missing_ok=True)
        self.resume_from(directory, manifest)

    def _new_parts(self, histories: dict[str, KeyHistory]) -> Iterator[storage.Part]:
        for key, first_new in self._changed.items():
            history = histories.get(key)
            if history is not None:
                start = max(first_new, history.dropped)
                records_N = history.records_N[start - history.dropped :]
                yield storage.Part(key, start, history.dropped, records_N["step"], records_N["vector"])


def _pending_parts(pending: dict[str, list[np.ndarray]]) -> Iterator[storage.Part]:
    for key, added in pending.items():
        records_N = np.concatenate(added)
        yield storage.Part(key, 0, 0, records_N["step"], records_N["vector"])


def _files_of(manifest: storage.Manifest) -> set[str]:
    return {segment.name for segment in [*manifest.segments, manifest.pending] if segment}
