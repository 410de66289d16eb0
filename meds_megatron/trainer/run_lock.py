"""The lock of a run directory: one process trains in it, wherever on the cluster it runs."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease, Timeout

from meds_megatron.errors import UserError

LEASE_SECONDS = 60.0
"""A process of another host that has not renewed its claim for so long is dead. One of this host is asked directly."""
SAME_HOST_SECONDS = 2.0


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
        owner = lease.owner
        if owner is None or owner.hostname == socket.gethostname():
            raise _held(directory, owner) from None
        print(
            f"meds: {directory} is locked by process {owner.pid} on {owner.hostname}; waiting up to "
            f"{1.5 * LEASE_SECONDS:.0f} s to see whether it still runs",
            file=sys.stderr,
        )
        try:
            lease.acquire(timeout=1.5 * LEASE_SECONDS)
        except Timeout:
            raise _held(directory, lease.owner) from None
    try:
        yield lease
    finally:
        lease.release()


def check_lock(lease: SoftFileLease) -> None:
    """Raises UserError when the lock has passed to another process."""
    if lease.compromise is not None:
        raise UserError(
            f"{lease.lock_file} was lost ({lease.compromise.reason}): another process may train in this directory; "
            "this one ends and leaves its last checkpoint as it is"
        )


def _held(directory: Path, owner) -> UserError:
    holder = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
    return UserError(
        f"{directory}: {holder} is training in this run directory; end it first, or give this run a name of its own "
        "(name=...)"
    )
