"""Directories that are complete or absent: written under a hidden name next to the target, renamed at the end."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meds_megatron import atomic
from meds_megatron.errors import UserError


def writing_directory(directory: str | Path) -> Path:
    """The hidden directory that becomes `directory` when it is complete."""
    directory = Path(directory).absolute()
    return directory.with_name(f".{directory.name}.writing")


@contextmanager
def new_directory(directory: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """The hidden directory to fill in the block, empty; it gets the name `directory` at the end of the block.

    It is removed when the block fails or is interrupted. Raises UserError when `directory` exists, at the beginning or
    at the end, and is not to be overwritten, when another process is writing it, or when the file system refuses
    something in the block.
    """
    directory = Path(directory).absolute()
    writing = writing_directory(directory)
    if not overwrite:
        _refuse_existing(directory)
    try:
        writing.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}): choose another directory") from error
    lock = _lock(writing, directory)
    try:
        # An interrupted process may have left files.
        for path in writing.iterdir():
            path.unlink()
        yield writing
        if not overwrite:
            _refuse_existing(directory)
        atomic.publish_directory(writing, directory)
    except OSError as error:
        raise UserError(f"writing {directory} failed: {error}") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        os.close(lock)


def _refuse_existing(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already: choose another directory or remove it")


def _lock(writing: Path, directory: Path) -> int:
    """Locks the hidden directory until the returned descriptor is closed or the process ends."""
    descriptor = os.open(writing, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is writing {directory}: choose another directory, or wait for it") from error
    except OSError:
        # Some network file systems have no locks.
        pass
    return descriptor
