"""Directories that are whole or not there: written under a hidden name beside the target, renamed at the end."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meds_megatron.errors import UserError


def writing_directory(directory: str | Path) -> Path:
    """Where what becomes `directory` is written until it is whole."""
    directory = Path(directory).absolute()
    return directory.with_name(f".{directory.name}.writing")


def begin_directory(directory: str | Path, overwrite: bool = False) -> None:
    """Makes the hidden directory, clearing what a broken attempt left there.

    Raises UserError when `directory` exists and is not to be overwritten, or cannot be written.
    """
    directory = Path(directory)
    if not overwrite:
        _refuse_existing(directory)
    writing = writing_directory(directory)
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}): choose another directory") from error


def finish_directory(directory: str | Path, overwrite: bool = False) -> None:
    """Gives the hidden directory its name, where it is to be overwritten in the place of an older one.

    Raises UserError when something else has got the name meanwhile.
    """
    directory = Path(directory).absolute()
    writing = writing_directory(directory)
    if not overwrite:
        _refuse_existing(directory)
    if directory.exists():
        replaced = directory.with_name(f".{directory.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(directory, replaced)
        os.replace(writing, directory)
        shutil.rmtree(replaced)
    else:
        os.replace(writing, directory)


@contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """The hidden directory of a `directory` that must not exist yet, for the one process that fills it.

    It is removed when the block fails or is interrupted; giving it its name is the block's last act. Raises UserError
    when `directory` exists, another process is writing it, or the file system refuses something in the block.
    """
    writing = writing_directory(directory)
    if writing.exists():
        os.close(_lock(writing, directory))
    begin_directory(directory)
    lock = _lock(writing, directory)
    try:
        yield writing
    except OSError as error:
        raise UserError(f"writing {directory} failed: {error}") from error
    finally:
        # Renamed by now if the block came to its end.
        shutil.rmtree(writing, ignore_errors=True)
        os.close(lock)


def _refuse_existing(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already: choose another directory or remove it")


def _lock(writing: Path, directory: str | Path) -> int:
    """Makes the hidden directory this process's own until the returned descriptor is closed, or the process ends."""
    descriptor = os.open(writing, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another process is writing {directory}: choose another directory, or wait for it") from error
    return descriptor
