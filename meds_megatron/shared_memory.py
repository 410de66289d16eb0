"""Files of a run in the shared memory of a node, in directories that are each owned by the processes with a lock on it.

The kernel releases the locks of a process that ends, however it ends: what no process has locked is left over from one
that was killed. Such a directory may also list, as symbolic links, files next to it that its owner shares with others.
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
"""File system in the memory of a node."""
PREFIX = "meds-"
"""Start of the names of the directories."""
OF_VLLM = ("psm_", "vllm_")
"""Starts of the names of the files through which the processes of a vLLM engine communicate; vLLM does not remove those
of killed processes."""


def claim(directory: Path) -> int:
    """Creates the directory where it is missing and locks it for this process: returns the file descriptor that holds
    the lock, which several processes can have. Raises OSError when it cannot be made."""
    while True:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        # `remove_unclaimed` may have removed it before it was locked.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return descriptor
        os.close(descriptor)


def list_files(directory: Path, files: Iterable[Path]) -> None:
    """Lists files next to a claimed directory that are to be removed with it."""
    for file in files:
        (directory / file.name).symlink_to(file)


def mapped_files() -> list[Path]:
    """Files of vLLM in shared memory that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(fields[5]) for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if path.parent == SHARED_MEMORY and path.name.startswith(OF_VLLM))


def remove(directory: Path) -> None:
    """Removes a directory with the files that it lists."""
    for entry in directory.iterdir():
        if entry.is_symlink():
            (directory.parent / entry.name).unlink(missing_ok=True)
    shutil.rmtree(directory)


def entries_of(processes: set[int]) -> set[Path]:
    """Entries of the shared memory that the processes have open or mapped."""
    found: set[str] = set()
    for process in processes:
        directory = Path("/proc") / str(process)
        try:
            found.update(os.readlink(file) for file in (directory / "fd").iterdir())
            found.update(line.split(None, 5)[-1].strip() for line in (directory / "maps").read_text().splitlines())
        except OSError:
            continue
    inside = (Path(name) for name in found if name.startswith(f"{SHARED_MEMORY}/"))
    return {SHARED_MEMORY / path.relative_to(SHARED_MEMORY).parts[0] for path in inside}


def remove_entries(paths: Iterable[Path]) -> None:
    """Removes files and directories of the shared memory, where they may be removed."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            # It may be another user's by now; the others are still to be removed.
            with suppress(OSError):
                path.unlink()


def remove_unclaimed(parent: Path = SHARED_MEMORY, prefix: str = PREFIX) -> list[Path]:
    """Removes the directories named `prefix`... in `parent` that no process has locked, with the files that they list;
    returns the directories. Those of other users stay."""
    removed = []
    for directory in parent.glob(f"{prefix}*"):
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError, BlockingIOError), _locked(directory):
            remove(directory)
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
