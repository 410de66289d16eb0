"""Runs a command and prints how long it took and how much memory its processes had at once.

    python tools/measure.py meds train configs/quickstart.yaml

Memory is the proportional set size (PSS) of all descendants, so that pages they share count once; a descendant that
outlives its parent still counts. Linux only.
"""

import subprocess
import sys
import threading
import time

import psutil

INTERVAL_SECONDS = 1.0


def main(command: list[str]) -> int:
    if not command:
        print("usage: python tools/measure.py COMMAND [ARGUMENT]...", file=sys.stderr)
        return 2
    known: dict[int, psutil.Process] = {}
    peak = 0
    began = time.monotonic()
    process = subprocess.Popen(command)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL_SECONDS):
            find_descendants(process.pid, known)
            peak = max(peak, sum(map(memory, known.values())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()
    done.set()
    watcher.join()
    print(f"{time.monotonic() - began:.0f} s, at most {peak / 2**30:.2f} GiB in {len(known)} processes")
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


def memory(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
