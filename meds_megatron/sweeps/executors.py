"""Executors of a sweep: Slurm, or the processes of this machine. Both submit with submitit."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import submitit

from meds_megatron.cluster.slurm.environment import SlurmJob, present_jobs
from meds_megatron.cluster.slurm.job import run_job
from meds_megatron.errors import UserError
from meds_megatron.sweeps.config import SweepJobConfig, SweepRun

LOST_SECONDS = 30.0
"""Time after which a job that Slurm no longer lists, and that has left no result, counts as failed."""
LOCAL_MINUTES = 10 * 365 * 24 * 60
"""submitit wants a limit on the time of a local run, which has none."""


class Executor(Protocol):
    """Whatever runs the jobs of a sweep."""

    name: str
    poll_seconds: float

    @property
    def most_at_a_time(self) -> int | None:
        """Runs that there is room for; None where there is no such limit."""

    def refresh(self) -> bool:
        """Looks which jobs there are; whether it is known."""

    def submit(self, run: SweepRun) -> submitit.Job:
        """Starts a job that trains the run. Raises UserError where it is not taken."""

    def has_ended(self, job: submitit.Job) -> bool:
        """Whether a job had ended at the last `refresh`."""

    def earlier_jobs(self, ids: Mapping[str, str]) -> dict[str, submitit.Job]:
        """Those of the jobs of an earlier start of the sweep, ids by run, that have not ended."""

    def stop(self, jobs: Collection[submitit.Job]) -> None:
        """Ends jobs when the sweep ends before them."""


class LocalExecutor:
    """Processes of this machine, each with GPUs of its own."""

    name = "local"
    poll_seconds = 2.0

    def __init__(self, directory: Path, job: SweepJobConfig) -> None:
        """Raises UserError where this machine has fewer GPUs than a run needs."""
        self._submitit = submitit.LocalExecutor(directory)
        self._submitit.update_parameters(timeout_min=LOCAL_MINUTES)
        self._gpus, self._gpus_of_run = visible_gpus(), job.gpus_per_node
        self._taken: list[tuple[submitit.Job, list[str]]] = []
        """Jobs with their GPUs."""
        self.most_at_a_time: int | None = None
        if self._gpus and self._gpus_of_run:
            if self._gpus_of_run > len(self._gpus):
                raise UserError(
                    f"a run needs job.gpus_per_node = {self._gpus_of_run}, but this machine has {len(self._gpus)} "
                    "GPUs; lower it, and cluster.ranks_per_node with it."
                )
            self.most_at_a_time = len(self._gpus) // self._gpus_of_run

    def refresh(self) -> bool:
        self._taken = [(job, gpus) for job, gpus in self._taken if not job.done()]
        return True

    def submit(self, run: SweepRun) -> submitit.Job:
        taken = {gpu for _, gpus in self._taken for gpu in gpus}
        gpus = [gpu for gpu in self._gpus if gpu not in taken][: self._gpus_of_run]
        visible = ",".join(gpus) if gpus else os.environ.get("CUDA_VISIBLE_DEVICES")
        # The runs' processes inherit that Ctrl-C is ignored: this one decides how they end.
        with _ignoring_interrupts():
            job = self._submitit.submit(train_here, run.arguments, visible)
        self._taken.append((job, gpus))
        return job

    def has_ended(self, job: submitit.Job) -> bool:
        # One that has ended since then still has its GPUs.
        return all(job is not other for other, _ in self._taken)

    def earlier_jobs(self, ids: Mapping[str, str]) -> dict[str, submitit.Job]:
        """None: local runs end with the sweep."""
        return {}

    def stop(self, jobs: Collection[submitit.Job]) -> None:
        """Makes the runs save themselves and end, and waits for that."""
        running = [job for job in jobs if not job.done()]
        if running:
            print(f"meds: the sweep stops when its {len(running)} runs have saved themselves", file=sys.stderr)
        for job in running:
            # submitit's controller passes it on to `train_here`.
            os.kill(int(job.job_id), signal.SIGTERM)
        while not all(job.done() for job in running):
            time.sleep(0.2)


class SlurmExecutor:
    """Jobs of Slurm, which continue without the sweep's process."""

    name = "slurm"
    poll_seconds = 15.0
    most_at_a_time: int | None = None

    def __init__(self, directory: Path, job: SweepJobConfig) -> None:
        """Raises UserError where there is no sbatch."""
        if not shutil.which("sbatch"):
            raise UserError(
                "there is no sbatch on this machine; run the sweep on a login node, or with --executor local."
            )
        self._directory, self._srun, self._python = directory, list(job.srun), job.python or sys.executable
        self._listed: set[str] = set()
        self._missing_since: dict[str, float] = {}
        """When a job was first not listed, by its id."""
        # `exec`: the signal before the end of the time goes to the process that the batch script is.
        self._submitit = submitit.SlurmExecutor(directory, python=f"exec {sys.executable}")
        # submitit's own signal is not used: `cluster.slurm.job` saves, and requeues the job.
        extra: dict[str, Any] = {"signal": f"B:USR1@{job.save_seconds}", "requeue": True}
        optional = {
            "partition": job.partition,
            "account": job.account,
            "cpus_per_task": job.cpus_per_task,
            "gpus_per_node": job.gpus_per_node or None,
            "exclusive": job.exclusive or None,
            "mem": job.memory or ("0" if job.exclusive else None),
        }
        self._submitit.update_parameters(
            nodes=job.nodes,
            ntasks_per_node=1,
            time=round(job.hours * 60),
            stderr_to_stdout=True,
            use_srun=False,
            additional_parameters=extra,
            **{key: value for key, value in optional.items() if value is not None},
        )

    def refresh(self) -> bool:
        jobs = present_jobs()
        if jobs is None:
            print("meds: squeue does not answer; asking again", file=sys.stderr)
            return False
        self._listed = jobs
        return True

    def submit(self, run: SweepRun) -> submitit.Job:
        self._submitit.update_parameters(job_name=run.name)
        try:
            return self._submitit.submit(train_in_slurm, run.arguments, self._srun, self._python)
        except submitit.core.utils.FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"Slurm does not take the job of the run {run.name}: {reason}") from error

    def has_ended(self, job: submitit.Job) -> bool:
        if job.job_id in self._listed:
            self._missing_since.pop(job.job_id, None)
            return False
        # The job's last files may show up on this machine later than its end.
        since = self._missing_since.setdefault(job.job_id, time.monotonic())
        return job.paths.result_pickle.exists() or time.monotonic() - since > LOST_SECONDS

    def earlier_jobs(self, ids: Mapping[str, str]) -> dict[str, submitit.Job]:
        while not self.refresh():
            time.sleep(self.poll_seconds)
        return {
            name: submitit.SlurmJob(folder=self._directory, job_id=job)
            for name, job in ids.items()
            if job in self._listed
        }

    def stop(self, jobs: Collection[submitit.Job]) -> None:
        """Leaves them: the next start of the sweep follows them."""


def train_in_slurm(arguments: list[str], srun_options: list[str], python: str) -> int:
    """The batch process of a run's job. The exit code of the run."""
    slurm = SlurmJob.from_environment()
    assert slurm is not None
    code, requeued = run_job(slurm, srun_options, python, arguments)
    if requeued:
        # Slurm ends this process; a result now would make the job a finished one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            signal.pause()
    return code


def train_here(arguments: list[str], visible: str | None) -> int:
    """A run on this machine; its exit code. SIGTERM is passed on to it. `visible` is its CUDA_VISIBLE_DEVICES: submitit
    hides all GPUs from this process."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    run = subprocess.Popen(_run_command(arguments), env=environment, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda number, _: run.send_signal(number))
    return run.wait()


def _run_command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "meds_megatron.cli", "train", *arguments]


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """SIGINT is ignored in the block and by processes that it starts. Only the main thread can choose so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
