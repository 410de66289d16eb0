"""A shard on disk: one file, written anew by every save.

    magic (8 bytes) | version, header bytes (uint32 each) | file bytes (uint64) | header | vectors | checksum (32 bytes)

`shard-00002-of-00004.memory` holds all of shard 2 of 4, so no two saves share a byte. The header is JSON: rank, shards,
step, config, the moments of the statistics, and key, number and length of the vectors of every key, first those of the
clustered, then those of the remembered but not yet clustered ones. In that order follow the keys' steps [N] int32 and
vectors [N, F] float32. Everything is little-endian and nothing is pickled. Labels are not stored: a load clusters anew.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meds_megatron.errors import UserError
from meds_megatron.memory.history import new_records
from meds_megatron.memory.statistics import Moments

MAGIC = b"MEDSMEM\n"
VERSION = 2
PREFIX = struct.Struct("<8sIIQ")
CHECKSUM_BYTES = 32
FILE_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.memory")
REMEDY = "resume from another checkpoint, or set memory.skip_damaged=true to go on without what it holds."

Records = dict[str, np.ndarray]
"""Records [N] of each key (see `history.record_type`), oldest first; only their vectors and steps are stored."""


class DamagedError(UserError):
    """A file of a saved memory that is missing, unreadable, cut short, altered, or of another version."""


@dataclass(frozen=True)
class Snapshot:
    """All of a shard that its file holds."""

    rank: int
    shards: int
    step: int
    config: dict
    moments: Moments | None
    clustered: Records
    pending: Records
    """Vectors that were remembered but not clustered yet."""


def write_snapshot(directory: Path, snapshot: Snapshot) -> None:
    """Write a shard's file, which appears complete or not at all and is on disk when this returns; then remove files
    of another number of shards, which it supersedes. Raises UserError when it cannot be written."""
    moments = snapshot.moments and [snapshot.moments.count, *(array.tolist() for array in snapshot.moments[1:])]
    tables = (snapshot.clustered, snapshot.pending)
    sizes = [[(key, *records_N["vector"].shape) for key, records_N in table.items()] for table in tables]
    header = json.dumps(
        {
            "rank": snapshot.rank,
            "shards": snapshot.shards,
            "step": snapshot.step,
            "config": snapshot.config,
            "moments": moments,
            "clustered": sizes[0],
            "pending": sizes[1],
        }
    ).encode()
    data_bytes = sum(count * (4 + 4 * features) for table in sizes for _, count, features in table)
    file_bytes = PREFIX.size + len(header) + data_bytes + CHECKSUM_BYTES

    def contents() -> Iterator[bytes]:
        yield PREFIX.pack(MAGIC, VERSION, len(header), file_bytes)
        yield header
        for table in tables:
            for records_N in table.values():
                yield records_N["step"].tobytes()
                yield records_N["vector"].tobytes()

    path = directory / _file_name(snapshot.rank, snapshot.shards)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_file(path, contents())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make space or access there, or save elsewhere."
        ) from error
    for other, (_, shards) in _files_in(directory):
        if shards != snapshot.shards:
            other.unlink(missing_ok=True)


def snapshot_files(directory: Path, rank: int, shards: int) -> list[Path]:
    """Files that shard `rank` of `shards` has to read: its own when as many shards were saved, else all of them.
    Raises UserError when the directory holds no saved memory, or those of two numbers of shards."""
    saved = sorted({count for _, (_, count) in _files_in(directory)})
    if not saved:
        raise UserError(f"{directory} holds no saved memory (no shard-*.memory): give the folder of a checkpoint.")
    if len(saved) > 1:
        raise UserError(f"{directory} holds memories of {saved} shards: remove the files of all but one of these.")
    ranks = [rank] if saved[0] == shards else range(saved[0])
    return [directory / _file_name(saved_rank, saved[0]) for saved_rank in ranks]


def read_snapshot(path: Path) -> Snapshot:
    """A shard's file. Raises DamagedError, which names the file and its damage, before any of it is used."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: {REMEDY}") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from None
    header_end = PREFIX.size + _header_bytes(path, content)
    header = json.loads(content[PREFIX.size : header_end])
    saved_as = _file_name(header["rank"], header["shards"])
    if path.name != saved_as:
        raise DamagedError(f"{path} is a copy of {saved_as} under the name of another shard: {REMEDY}")
    moments, offset = header["moments"], header_end
    if moments is not None:
        moments = Moments(moments[0], np.array(moments[1]), np.array(moments[2]))
    tables: dict[str, Records] = {"clustered": {}, "pending": {}}
    for name, table in tables.items():
        for key, count, features in header[name]:
            steps_N = np.frombuffer(content, "<i4", count, offset)
            vectors = np.frombuffer(content, "<f4", count * features, offset + steps_N.nbytes)
            table[key] = new_records(vectors.reshape(count, features), steps_N)
            offset += steps_N.nbytes + vectors.nbytes
    return Snapshot(header["rank"], header["shards"], header["step"], header["config"], moments, **tables)


def _header_bytes(path: Path, content: bytes) -> int:
    """Length of the header of a file that is complete, of this version and unaltered; DamagedError otherwise."""
    if len(content) < PREFIX.size + CHECKSUM_BYTES:
        raise DamagedError(f"{path} is cut short to {len(content)} bytes: {REMEDY}")
    magic, version, header_bytes, file_bytes = PREFIX.unpack_from(content)
    if magic != MAGIC:
        raise DamagedError(f"{path} is not a saved memory: {REMEDY}")
    if version != VERSION:
        raise DamagedError(
            f"{path} has format version {version}, this program reads version {VERSION}: "
            "load it with the release that wrote it."
        )
    if len(content) != file_bytes:
        raise DamagedError(f"{path} is cut short or has grown, {len(content)} bytes instead of {file_bytes}: {REMEDY}")
    checksum = hashlib.blake2b(memoryview(content)[:-CHECKSUM_BYTES], digest_size=CHECKSUM_BYTES).digest()
    if checksum != content[-CHECKSUM_BYTES:]:
        raise DamagedError(f"{path} does not have the content it was written with (checksum differs): {REMEDY}")
    return header_bytes


def _file_name(rank: int, shards: int) -> str:
    return f"shard-{rank:05d}-of-{shards:05d}.memory"


def _files_in(directory: Path) -> list[tuple[Path, tuple[int, int]]]:
    """Snapshot files of a directory, each with its rank and number of shards."""
    if not directory.is_dir():
        return []
    matches = ((path, FILE_NAME.fullmatch(path.name)) for path in sorted(directory.iterdir()))
    return [(path, (int(match[1]), int(match[2]))) for path, match in matches if match]


def _write_file(path: Path, contents: Iterable[bytes]) -> None:
    """Write contents and their checksum under another name, force them to disk, and only then rename the file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    try:
        with open(unfinished, "wb", buffering=2**20) as file:
            for part in contents:
                checksum.update(part)
                file.write(part)
            file.write(checksum.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
