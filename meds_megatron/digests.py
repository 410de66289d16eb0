"""Digests of a checkpoint's files: taken while they are written, kept in its marker, checked by who reads the files.

The marker, `complete.json`, has the size of every other file and its blake2b, and a digest of itself. Markers of
earlier releases have sizes only.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

MARKER = "complete.json"
DIGEST_BYTES = 32


class DigestFile(io.BufferedWriter):
    """A new file that is written from its beginning to its end."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(io.FileIO(path, "w"))
        self._hash = _new_hash()

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return super().write(data)

    def seekable(self) -> bool:
        """No: what is written twice would be in the digest twice."""
        return False

    @property
    def digest(self) -> str:
        """Digest of what was written so far."""
        return self._hash.hexdigest()


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """Content of a marker."""

    sizes: dict[str, int]
    """Sizes by name relative to the checkpoint."""
    digests: dict[str, str]
    """Digests of all these files, or of none."""

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Raises ValueError or OSError for a marker that does not list the files of a checkpoint."""
        try:
            content = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        if not isinstance(content, dict) or set(content) not in ({"files"}, {"files", "digests", "digest"}):
            raise ValueError("it has other keys than files, digests and digest")
        sizes, digests = content["files"], content.get("digests", {})
        if not isinstance(sizes, dict) or not sizes or not all(type(size) is int for size in sizes.values()):
            raise ValueError("files is not the sizes of files by name")
        if not isinstance(digests, dict) or ("digests" in content and digests.keys() != sizes.keys()):
            raise ValueError("digests is not those of the same files")
        for name in sizes:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name} is not in the checkpoint")
        manifest = cls(sizes, digests)
        if "digest" in content and content["digest"] != manifest._digest:
            raise ValueError("it is altered")
        return manifest

    def write_text(self) -> str:
        """Text that `read` reads."""
        return json.dumps({"files": self.sizes, "digests": self.digests, "digest": self._digest}, indent=1)

    @property
    def _digest(self) -> str:
        """Digest of the marker's own content."""
        content = json.dumps([self.sizes, self.digests], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=DIGEST_BYTES).hexdigest()

    def damage(self, directory: Path, names: Iterable[str], content: bool = True) -> str | None:
        """Half a sentence about the first of these files that is not as it was written; None if all are. Without
        `content` only sizes are looked at."""
        for name in names:
            path, size = directory / name, self.sizes[name]
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                return f"{path} is missing"
            if found != size:
                return f"{path} has {found} bytes, expected {size}"
            if content and name in self.digests and file_digest(path) != self.digests[name]:
                return f"{path} is altered (its digest differs from that in {MARKER})"
        return None


def damage_of(directory: Path, content: bool = True, skip: str | None = None) -> str | None:
    """Half a sentence about a complete checkpoint that lacks a file or a part of one, or of which a file that is not
    large is altered; None if it is whole. Without `content`, and for files in the directory `skip`, only sizes are
    looked at."""
    try:
        manifest = Manifest.read(directory)
        small = [name for name in manifest.sizes if not is_large(name) and PurePosixPath(name).parts[0] != skip]
        damage = manifest.damage(directory, manifest.sizes, content=False)
        return damage or (manifest.damage(directory, small) if content else None)
    except (ValueError, OSError) as error:
        return f"{directory / MARKER} cannot be read ({error})"


def is_large(name: str) -> bool:
    """Whether a file of a checkpoint has tensors of model or optimizer: trainer ranks write and check these."""
    return name.endswith(".distcp")


def _new_hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=DIGEST_BYTES)
