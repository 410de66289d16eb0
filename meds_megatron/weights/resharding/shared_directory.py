"""Directories in a node's shared memory, each owned by the processes that hold a lock on it.

The kernel releases the locks of a process that ends, however it ends: what no process has locked is left over from a
run that was killed.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "meds-weights-"
"""Start of the names of all such directories."""


def claim(directory: Path) -> int:
    """Creates the directory where it is missing and locks it for this process: returns the file descriptor that holds
    the lock, which other processes can share. Raises OSError when it cannot be made."""
    while True:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # `remove_unclaimed` may have removed it before it was locked.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                    return descriptor
            os.close(descriptor)
        if not directory.parent.is_dir():
            raise FileNotFoundError(2, "No such file or directory", str(directory.parent))


def remove_unclaimed(parent: Path) -> list[Path]:
    """Removes the directories named PREFIX... in `parent` that no process has locked; returns them. Those of other
    users stay."""
    removed = []
    for directory in parent.glob(f"{PREFIX}*"):
        with suppress(FileNotFoundError, PermissionError, BlockingIOError), _locked(directory):
            shutil.rmtree(directory)
            removed.append(directory)
    return removed


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the only lock on the directory. Raises BlockingIOError when another process has one."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
