"""Segments: files of plain arrays, written once and named by their checksum, so that damage shows.

    magic (8 bytes) | version, header length (uint32 each) | header, JSON | arrays back to back | checksum (32 bytes)

The header lists name, type and shape of the arrays in their order. Everything is little-endian; nothing is pickled.
"""

import hashlib
import json
import os
import struct
from pathlib import Path

import numpy as np

from meds_megatron.errors import UserError

MAGIC = b"MEDSMEM\n"
VERSION = 1
PREFIX = struct.Struct("<8sII")
CHECKSUM_BYTES = 32


class DamagedError(UserError):
    """A file of a saved memory that is missing, cut short, altered, or of another version."""


def write_segment(directory: Path, arrays: dict[str, np.ndarray]) -> tuple[str, int]:
    """Write arrays to a new file in `directory`; returns its name and its size in bytes.

    The file appears whole or not at all, and is on disk when this returns.
    """
    listed = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    header = json.dumps(listed).encode()
    parts = [PREFIX.pack(MAGIC, VERSION, len(header)), header]
    parts += [memoryview(np.ascontiguousarray(array)).cast("B") for array in arrays.values() if array.size]
    checksum = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    for part in parts:
        checksum.update(part)
    name = f"{checksum.hexdigest()[:32]}.segment"
    write_whole(directory / name, [*parts, checksum.digest()])
    return name, sum(len(part) for part in parts) + CHECKSUM_BYTES


def read_segment(path: Path, size: int) -> dict[str, np.ndarray]:
    """The arrays of a segment whose size in bytes is known from the manifest; DamagedError names the file and why."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: {REMEDY}") from None
    if len(content) < min(size, PREFIX.size + CHECKSUM_BYTES) or len(content) != size:
        raise DamagedError(f"{path} is cut short or has grown, {len(content)} bytes instead of {size}: {REMEDY}")
    magic, version, header_size = PREFIX.unpack_from(content)
    if magic != MAGIC:
        raise DamagedError(f"{path} is not a segment of a memory: {REMEDY}")
    if version != VERSION:
        raise DamagedError(
            f"{path} has format version {version}, this program reads version {VERSION}: "
            "load it with the release that wrote it."
        )
    if hashlib.blake2b(content[:-CHECKSUM_BYTES], digest_size=CHECKSUM_BYTES).digest() != content[-CHECKSUM_BYTES:]:
        raise DamagedError(f"{path} does not have the content it was written with (checksum differs): {REMEDY}")
    offset = PREFIX.size + header_size
    arrays = {}
    for name, dtype, shape in json.loads(content[PREFIX.size : offset]):
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(content, np.dtype(dtype), count, offset).reshape(shape)
        offset += count * np.dtype(dtype).itemsize
    return arrays


REMEDY = "resume from another checkpoint, or set memory.skip_damaged=true to go on without what it holds."


def write_whole(path: Path, parts: list[bytes]) -> None:
    """Write a file under another name, force it to disk, and only then give it its name."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            for part in parts:
                file.write(part)
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
