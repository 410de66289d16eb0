"""Directories that are whole or not there: written under a hidden name beside the target, renamed at the end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meds_megatron.errors import UserError


def writing_directory(directory: str | Path) -> Path:
    """Where what becomes `directory` is written until it is whole."""
    directory = Path(directory)
    return directory.with_name(f".{directory.name}.writing")


def begin_directory(directory: str | Path, overwrite: bool = False) -> None:
    """Makes the hidden directory, clearing what a broken attempt left there.

    Raises UserError when `directory` exists and is not to be overwritten, or cannot be written.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} exists already: choose another directory or remove it")
    writing = writing_directory(directory)
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error}): choose another directory") from error


def finish_directory(directory: str | Path) -> None:
    """Gives the hidden directory its name, in the place of an older one."""
    directory = Path(directory)
    writing = writing_directory(directory)
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
    when `directory` exists, or the file system refuses something in the block.
    """
    begin_directory(directory)
    writing = writing_directory(directory)
    try:
        yield writing
    except OSError as error:
        raise UserError(f"writing {directory} failed: {error}") from error
    finally:
        # Renamed by now if the block came to its end.
        shutil.rmtree(writing, ignore_errors=True)
