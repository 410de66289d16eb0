"""Processes of this machine: those that descend from this one, their states and their ends. Linux only, standard
library only."""

import ctypes
import os
import re
import signal
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

_libc = ctypes.CDLL(None)


def adopt_orphans() -> None:
    """Descendants whose parents end become children of this process, so that `descendants` finds them."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ends_with_parent() -> None:
    """`preexec_fn` of a child that is to be terminated when this process dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def dies_with_parent(parent: int) -> None:
    """Has this process killed when the thread of process `parent` that started it ends, also if it has ended by now."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def descendants(ancestor: int | None = None) -> set[int]:
    """Ids of all processes that descend from `ancestor`, by default from this one."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)) is not None:
            children[parent].append(int(entry.name))
    found, queue = set(), [os.getpid() if ancestor is None else ancestor]
    while queue:
        queue += (below := children[queue.pop()])
        found.update(below)
    return found


def _parent(process: Path) -> int | None:
    try:
        # The command's name, in brackets, may contain anything.
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def kill_tree(process: int) -> None:
    """Kills a process and its descendants, also those that are stopped."""
    for found in {process, *descendants(process)}:
        with suppress(ProcessLookupError):
            os.kill(found, signal.SIGKILL)


def kill_descendants(seconds: float) -> None:
    """Kills all descendants; returns when none is left, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := descendants()) and time.monotonic() < deadline:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        time.sleep(0.05)


def process_state(process: int) -> str:
    """The kernel's word for the state of a process of this machine. Raises FileNotFoundError when it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    state = re.search(r"State:\s+\S+ \(([^)]*)\)", status)
    return state[1] if state else "state unknown"
