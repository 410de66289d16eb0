"""The lock of a run directory: one process trains in it, wherever on the cluster it runs."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease, Timeout

from meds_megatron.errors import UserError

LEASE_SECONDS = 60.0
"""A process of another host that has not renewed its claim for this long is dead. One of this host is checked
directly."""
SAME_HOST_SECONDS = 2.0
UNREADABLE_SECONDS = 4.0
"""Time within which a file that holds no claim is taken over."""
READS = 3
READ_PAUSE_SECONDS = 0.1


@contextmanager
def run_lock(directory: Path) -> Iterator[SoftFileLease]:
    """Holds `directory`/lock as long as the block lasts. The file is renewed by a thread, so that it works on file
    systems without locks, NFS among them, and does not outlive a killed process.

    Raises UserError when another process holds it. `check_lock` finds out whether it was lost, which a process that
    was stopped for longer than LEASE_SECONDS may have.
    """
    lease = SoftFileLease(directory / "lock", lease_duration=LEASE_SECONDS, thread_local=False)
    try:
        lease.acquire(timeout=SAME_HOST_SECONDS)
    except Timeout:
        _wait_for_owner(directory, lease)
    try:
        yield lease
    finally:
        lease.release()


def check_lock(lease: SoftFileLease) -> None:
    """Raises UserError when the lock has passed to another process, as its file shows at this moment: the thread that
    renews the claim of a process that was stopped notices it only after a while."""
    loss = lock_loss(lease)
    if loss is not None:
        raise UserError(
            f"{lease.lock_file} was lost ({loss}): another process may train in this directory; this one ends and "
            "leaves its last checkpoint as it is"
        )


def lock_loss(lease: SoftFileLease) -> str | None:
    """Reason why the lock was lost; None while this process has it."""
    noticed = None if lease.compromise is None else lease.compromise.reason
    for read in range(READS):
        # A process that wants the lock may move the file aside for an instant.
        time.sleep(READ_PAUSE_SECONDS if read else 0.0)
        owner = lease.owner
        if owner is not None and owner.token == lease.token:
            return noticed
    if owner is not None:
        return f"process {owner.pid} on {owner.hostname} has it"
    try:
        os.lstat(lease.lock_file)
    except FileNotFoundError:
        return "the file is gone"
    except OSError:
        # The file system does not answer: nobody else gets the lock before the thread that renews it gives up.
        return noticed
    return "another process has overwritten the file"


def _wait_for_owner(directory: Path, lease: SoftFileLease) -> None:
    """Acquires the lock as soon as its owner is found to be dead. Raises UserError when it is not."""
    owner, seconds = lease.owner, 1.5 * LEASE_SECONDS
    if owner is None and _release_abandoned(Path(lease.lock_file)):
        seconds = UNREADABLE_SECONDS
    elif owner is None or owner.hostname == socket.gethostname():
        raise _held(directory, lease)
    else:
        print(
            f"meds: {directory} is locked by process {owner.pid} on {owner.hostname}; waiting up to {seconds:.0f} s to "
            "see whether it still runs",
            file=sys.stderr,
        )
    try:
        lease.acquire(timeout=seconds)
    except Timeout:
        raise _held(directory, lease) from None


def _release_abandoned(lock: Path) -> bool:
    """Whether the file was empty and is older than a lease: the machine of its owner crashed before the claim was on
    disk. It then has a content that is no claim, which filelock takes over; an empty one it never does."""
    with suppress(OSError), open(lock, "r+b", buffering=0) as file:
        found = os.fstat(file.fileno())
        if found.st_size == 0 and time.time() - found.st_mtime > LEASE_SECONDS:
            file.write(b"abandoned\n")
            return True
    return False


def _held(directory: Path, lease: SoftFileLease) -> UserError:
    owner, file = lease.owner, Path(lease.lock_file)
    if owner is None and file.is_file() and file.stat().st_size == 0:
        return UserError(
            f"{file} is empty: another process is about to train in this run directory, or one was lost with its "
            f"machine; try again in {LEASE_SECONDS:.0f} s, or remove the file if there is none"
        )
    holder = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
    return UserError(
        f"{directory}: {holder} is training in this run directory; end it first, or give this run a name of its own "
        "(name=...)"
    )
