"""Runs a command and prints how long it took and how much memory its processes had at once.

    python tools/measure.py [--processes] meds train configs/quickstart.yaml

Memory is the proportional set size (PSS) of all descendants, so that pages they share count once; a descendant that
outlives its parent still counts. With --processes the largest resident size that each process had follows (of those
above 100 MiB; pages they share count in each). Linux only.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

INTERVAL_SECONDS = 1.0
LARGE = 100 * 2**20


def main(command: list[str]) -> int:
    by_process = command[:1] == ["--processes"]
    command = command[by_process:]
    if not command:
        print("usage: python tools/measure.py [--processes] COMMAND [ARGUMENT]...", file=sys.stderr)
        return 2
    known: dict[int, psutil.Process] = {}
    largest: dict[int, tuple[str, int]] = {}
    peak = 0
    began = time.monotonic()
    process = subprocess.Popen(command)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL_SECONDS):
            find_descendants(process.pid, known)
            peak = max(peak, sum(map(memory, known.values())))
            if by_process:
                largest.update((pid, found) for pid in known if (found := largest_size(pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()
    done.set()
    watcher.join()
    print(f"{time.monotonic() - began:.0f} s, at most {peak / 2**30:.2f} GiB in {len(known)} processes")
    for pid, (name, size) in sorted(largest.items()):
        if size > LARGE:
            print(f"{size / 2**20:6.0f} MiB  {pid:7d}  {name}")
    return status


def find_descendants(root: int, known: dict[int, psutil.Process]) -> None:
    """Adds to `known` whatever the known processes have started since."""
    for pid in [root, *known]:
        try:
            found = psutil.Process(pid)
            known.setdefault(pid, found)
            for child in found.children(recursive=True):
                known.setdefault(child.pid, child)
        except psutil.NoSuchProcess:
            continue


def largest_size(pid: int) -> tuple[str, int] | None:
    """Command and largest resident size of a process until now; None once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return (name, sizes[0]) if sizes else None


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
