"""The processes of a run, found from outside by what the system knows of them, and what they have in shared memory."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

KINDS = {
    "trainer rank": r"^ray::PolicyWorker",
    "memory shard": r"^ray::_ShardActor",
    "engine": r"^ray::RolloutEngine",
    "engine TP worker": r"^VLLM::Worker",
    "grader": r"reward/worker\.py",
}
"""Command line of each kind of process."""
RAYS_AGENTS = r"^ray::(DashboardAgent|RuntimeEnvAgent)"
"""Agents of a node. They end about a minute after a driver that was killed, and hold nothing of the run."""
SHARED_MEMORY = Path("/dev/shm")


class RunProcess(subprocess.Popen):
    """`meds train` as a terminal or a scheduler starts it: with a process group of its own and default signal
    handlers."""

    def __init__(self, settings: list[str], output: Path):
        with open(output, "a") as file:
            super().__init__(
                [sys.executable, "-m", "meds_megatron.cli", "train", "configs/quickstart.yaml", *settings],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=restore_signals,
            )

    def descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def of_kind(self, kind: str) -> list[psutil.Process]:
        found = [process for process in self.descendants() if re.search(KINDS[kind], command(process))]
        return sorted(found, key=lambda process: process.pid)


def restore_signals() -> None:
    """`preexec_fn` of a process that takes signals as one that a terminal starts, also where this one ignores them."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command(process: psutil.Process) -> str:
    """Command line; "" for a process that has ended."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def running(processes: list[psutil.Process]) -> list[str]:
    """Command lines of those that have not ended, Ray's agents apart."""
    commands = [command(process) for process in processes if process.is_running()]
    return [line for line in commands if line and not re.search(RAYS_AGENTS, line)]


def shared_files(processes: list[psutil.Process]) -> set[Path]:
    """Files in shared memory that the processes have mapped or opened, and the directories that they hold."""
    found = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            opened = [os.readlink(entry) for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        except OSError:
            continue
        found |= {Path(name) for name in [*(line.split(maxsplit=5)[-1] for line in lines), *opened]}
    return {path for path in found if path.parent == SHARED_MEMORY and path.exists()}
