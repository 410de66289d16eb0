"""A shard on disk: segments that only ever get added, and a manifest that says which of them count.

A directory holds the manifests of all shards, `shard-00000-of-00004.json`, each written last and in one go, and their
segments. A save writes the vectors that came since the one before; older segments are linked from where that was (or
copied where the file system has no links), so every directory is whole by itself and older ones can be deleted.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meds_megatron.errors import UserError
from meds_megatron.memory.history import new_records
from meds_megatron.memory.segments import REMEDY, VERSION, DamagedError, read_segment, write_segment, write_whole

MANIFEST = re.compile(r"shard-(\d{5})-of-(\d{5})\.json")


@dataclass(frozen=True)
class Part:
    """Consecutive vectors of a key: `start` numbers the first of them in the key's life; vectors of this key with a
    number below `dropped` are gone. All vectors of a key have as many features, and keys of answers without a
    fingerprint have none."""

    key: str
    start: int
    dropped: int
    steps_N: np.ndarray
    vectors_NF: np.ndarray


@dataclass(frozen=True)
class Segment:
    """A file of parts, as a manifest lists it."""

    name: str
    size: int
    vectors: int


@dataclass
class Manifest:
    """Everything about a saved shard that is not in its segments."""

    rank: int
    shards: int
    step: int
    config: dict
    segments: list[Segment] = field(default_factory=list)
    pending: Segment | None = None
    """Vectors that were remembered but not clustered yet."""


def write_parts(directory: Path, parts: Iterable[Part]) -> Segment | None:
    """Write parts as one segment; none when there are no parts."""
    parts = list(parts)
    if not parts:
        return None
    names = [part.key.encode("utf-8") for part in parts]
    arrays = {
        "keys": np.frombuffer(b"".join(names), np.uint8),
        "key_bytes": np.array([len(name) for name in names], "<i8"),
        "start": np.array([part.start for part in parts], "<i8"),
        "dropped": np.array([part.dropped for part in parts], "<i8"),
        "count": np.array([len(part.steps_N) for part in parts], "<i8"),
        "step": np.concatenate([part.steps_N for part in parts]).astype("<i4"),
        "features": np.array([part.vectors_NF.shape[1] for part in parts], "<i8"),
        "vector": np.concatenate([part.vectors_NF.ravel() for part in parts]).astype("<f4"),
    }
    name, size = write_segment(directory, arrays)
    return Segment(name, size, len(arrays["step"]))


def read_parts(directory: Path, segment: Segment) -> Iterator[Part]:
    """The parts of a segment; DamagedError before the first when the file is damaged."""
    arrays = read_segment(directory / segment.name, segment.size)
    names = arrays["keys"].tobytes()
    key_end = end = vector_end = 0
    for place in range(len(arrays["count"])):
        key_start, key_end = key_end, key_end + int(arrays["key_bytes"][place])
        count, features = int(arrays["count"][place]), int(arrays["features"][place])
        begin, end = end, end + count
        vector_begin, vector_end = vector_end, vector_end + count * features
        yield Part(
            names[key_start:key_end].decode("utf-8"),
            int(arrays["start"][place]),
            int(arrays["dropped"][place]),
            arrays["step"][begin:end],
            arrays["vector"][vector_begin:vector_end].reshape(count, features),
        )


def join_parts(parts: list[Part]) -> tuple[int, np.ndarray]:
    """How many vectors of a key are gone, and the records [N] of those that are left, oldest first."""
    dropped = max(part.dropped for part in parts)
    end = max(part.start + len(part.steps_N) for part in parts)
    kept = []
    for part in sorted(parts, key=lambda part: part.start):
        gone = max(dropped - part.start, 0)
        kept.append(new_records(part.vectors_NF[gone:], part.steps_N[gone:]))
    records_N = np.concatenate(kept)
    return max(end - len(records_N), 0), records_N


def carry_over(segments: list[Segment], source: Path | None, target: Path) -> bool:
    """Make `target` hold segments that an earlier save left in `source`; false when one is no longer to be had."""
    for segment in segments:
        if _is_whole(target / segment.name, segment):
            continue
        if source is None or not _is_whole(source / segment.name, segment):
            return False
        (target / segment.name).unlink(missing_ok=True)
        try:
            os.link(source / segment.name, target / segment.name)
        except OSError:
            shutil.copyfile(source / segment.name, target / segment.name)
    return True


def _is_whole(path: Path, segment: Segment) -> bool:
    return path.is_file() and path.stat().st_size == segment.size


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write a shard's manifest, the last file of its save; manifests of another number of shards are superseded."""
    content = json.dumps(dataclasses.asdict(manifest), sort_keys=True)
    whole = {"version": VERSION, "checksum": _checksum(content), "manifest": json.loads(content)}
    name = f"shard-{manifest.rank:05d}-of-{manifest.shards:05d}.json"
    write_whole(directory / name, [json.dumps(whole, indent=1, sort_keys=True).encode()])
    for other, (_, shards) in _manifests_in(directory):
        if shards != manifest.shards:
            other.unlink(missing_ok=True)


def read_manifests(directory: Path, rank: int, shards: int, skip_damaged: bool) -> tuple[list[Manifest], list[str]]:
    """Manifests that a shard of this layout must read (its own if the number of shards is the saved one, else all),
    and what was left out because it is damaged. Raises UserError when the directory holds no complete memory."""
    found = _manifests_in(directory)
    layouts = sorted({saved for _, (_, saved) in found})
    if not layouts:
        raise UserError(f"{directory} holds no saved memory (no shard-*.json): give the folder of a checkpoint.")
    if len(layouts) > 1:
        raise UserError(f"{directory} holds memories of {layouts} shards: remove the manifests of all layouts but one.")
    wanted = [rank] if layouts[0] == shards else range(layouts[0])
    manifests, damages = [], []
    for saved_rank in wanted:
        try:
            manifests.append(_read_manifest(directory / f"shard-{saved_rank:05d}-of-{layouts[0]:05d}.json"))
        except DamagedError as damage:
            if not skip_damaged:
                raise
            damages.append(str(damage))
    return manifests, damages


def _manifests_in(directory: Path) -> list[tuple[Path, tuple[int, int]]]:
    if not directory.is_dir():
        return []
    matches = ((path, MANIFEST.fullmatch(path.name)) for path in sorted(directory.iterdir()))
    return [(path, (int(match[1]), int(match[2]))) for path, match in matches if match]


def _read_manifest(path: Path) -> Manifest:
    try:
        whole = json.loads(path.read_bytes())
        version, checksum, fields = whole["version"], whole["checksum"], whole["manifest"]
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: {REMEDY}") from None
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{path} is not a whole manifest of a memory: {REMEDY}") from None
    if version != VERSION:
        raise DamagedError(
            f"{path} has format version {version}, this program reads version {VERSION}: "
            "load it with the release that wrote it."
        )
    if _checksum(json.dumps(fields, sort_keys=True)) != checksum:
        raise DamagedError(f"{path} does not have the content it was written with (checksum differs): {REMEDY}")
    pending = Segment(**fields.pop("pending")) if fields["pending"] else fields.pop("pending")
    segments = [Segment(**segment) for segment in fields.pop("segments")]
    return Manifest(segments=segments, pending=pending, **fields)


def _checksum(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
