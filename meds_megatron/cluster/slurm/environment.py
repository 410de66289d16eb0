"""Environment variables that describe a Slurm job, and the few commands that control it.

Standard library only: the batch script may run outside the container that holds everything else.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

SIGNALLED = 128
"""Exit codes above it are those of processes that a signal ended."""
ANSWER_SECONDS = 30
"""Time for Slurm to answer a command."""


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process is a part of."""

    id: str
    name: str
    nodes: int
    restarts: int
    """Earlier starts of the job that ended in a requeue."""
    end_time: float | None
    """Seconds since the epoch at which the job's time is up, where Slurm provides it (23.02 and newer)."""
    node_list: str = ""
    """The names of the nodes as Slurm abbreviates them, `node[0-3]`."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
        """The job of this process; None outside of a job."""
        if "SLURM_JOB_ID" not in environment:
            return None
        end_time = environment.get("SLURM_JOB_END_TIME")
        return cls(
            id=environment["SLURM_JOB_ID"],
            name=environment.get("SLURM_JOB_NAME", "meds"),
            nodes=int(environment.get("SLURM_JOB_NUM_NODES", "1")),
            restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
            end_time=float(end_time) if end_time else None,
            node_list=environment.get("SLURM_JOB_NODELIST", ""),
        )

    @property
    def label(self) -> str:
        """A name of this start of the job that no other start has."""
        return f"{self.id}.{self.restarts}"

    def srun(self, options: list[str], command: list[str]) -> list[str]:
        """The command line that runs `command` once on each node with all that the job has there.

        The tasks start and end by themselves: without --kill-on-bad-exit=0 and --wait=0 Slurm ends the others when one
        has ended, and the job would have their exit code. Without --cpu-bind=none a task may be bound to one core.
        """
        layout = [f"--nodes={self.nodes}", f"--ntasks={self.nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
        ends = ["--kill-on-bad-exit=0", "--wait=0", "--mpi=none", "--overlap"]
        return ["srun", "--job-name=meds", *layout, *ends, *options, *command]

    def node_names(self) -> list[str]:
        """The nodes in the order of their tasks, by number where Slurm does not list their names."""
        names = (_output("scontrol", "show", "hostnames", self.node_list) or "").split()
        return names if len(names) == self.nodes else [f"node {number}" for number in range(self.nodes)]

    def requeue(self) -> str | None:
        """Puts the job back into the queue, which ends it. Returns Slurm's reason if it may not."""
        done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True)
        return None if done.returncode == 0 else (done.stderr or done.stdout).strip()


def exit_code(returncode: int) -> int:
    """Exit code that a shell reports for subprocess's `returncode`: 128 + n for one that signal n ended."""
    return SIGNALLED - returncode if returncode < 0 else returncode


def present_jobs() -> set[str] | None:
    """Ids of this user's jobs that have not ended; None where Slurm does not answer, as in a container without
    squeue."""
    listed = _output("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A")
    return None if listed is None else set(listed.split())


def _output(*command: str) -> str | None:
    """Output of a Slurm command; None if it is not there, fails, or does not answer within ANSWER_SECONDS."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
