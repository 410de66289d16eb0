"""Files and directories that appear whole or not at all, and that are on disk when they appear.

The one place that writes such files; a torn write, a kill or the loss of power leaves what was there before, but for an
instant between two renames in which a directory that is replaced has no name (`publish_directory`).
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def open_atomic(path: Path, mode: str = "w", newline: str | None = None) -> Iterator[IO[Any]]:
    """A file, open for writing text as UTF-8 or, with mode `wb`, bytes, that takes the name `path` at the end of the
    block; an error in the block leaves nothing. Raises OSError."""
    partial = partial_name(path)
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8", newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with open_atomic(path) as file:
        file.write(text)


def partial_name(path: Path) -> Path:
    """A hidden name next to `path` that no other process has: one that was stopped may resume and keep writing."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def publish_directory(partial: Path, directory: Path) -> None:
    """Gives the directory `partial` the name `directory`, in the place of an older one if there is one. Raises
    OSError."""
    sync_tree(partial)
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        os.replace(directory, replaced)
    os.replace(partial, directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Forces all files below a directory, and their names, to disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))


def sync(path: Path) -> None:
    """Forces a file, or the names in a directory, to disk; the latter only where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
