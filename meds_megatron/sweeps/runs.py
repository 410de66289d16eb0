"""Runs of a sweep, submitted with submitit to Slurm or to this machine's processes, and the table of their results.

What is finished is read from the runs' own directories, so a sweep that is started again continues where it stopped:
finished runs are left alone, jobs that are still queued or running are followed, others are submitted.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table

from meds_megatron import atomic
from meds_megatron.cluster.slurm.environment import SlurmJob, present_jobs
from meds_megatron.cluster.slurm.job import run_job
from meds_megatron.config import load_config
from meds_megatron.config.changes import make_another_run
from meds_megatron.errors import UserError
from meds_megatron.run.metrics_file import read_metrics
from meds_megatron.run.paths import RunPaths
from meds_megatron.sweeps.config import SEED, SweepConfig, SweepRun, expand, load_sweep

POLL_SECONDS = {"local": 2.0, "slurm": 15.0}
LOST_SECONDS = 30.0
"""Time after which a job that Slurm no longer lists, and that has left no result, counts as failed."""
LOCAL_MINUTES = 10 * 365 * 24 * 60
"""submitit wants a limit on the time of a local run, which has none."""

Executor = Literal["auto", "slurm", "local"]
State = Literal["waiting", "submitted", "finished", "failed"]


def sweep(
    path: str | Path,
    executor: Executor = "auto",
    report: Callable[[Table], None] | None = None,
    only: Container[str] | None = None,
) -> list[dict]:
    """Runs the sweep in a YAML file to its end; the rows of its table, which `directory`/results.csv holds too.

    `auto` submits to Slurm where there is an sbatch. `report` is called with the table whenever it changes. `only` are
    the names of the runs to take, by default all. Raises UserError for a mistake in the file, before any run is
    submitted.
    """
    config = load_sweep(path)
    runs = [run for run in expand(config, path) if only is None or run.name in only]
    if executor == "auto":
        executor = "slurm" if shutil.which("sbatch") else "local"
    return Sweep(config, runs, executor).run(report or (lambda table: None))


def sweep_with_live_table(path: str | Path, executor: Executor) -> list[dict]:
    """`sweep`, with the table on the terminal as it grows; elsewhere only once, at the end."""
    console = Console(stderr=True)
    if not console.is_terminal:
        tables: list[Table] = []
        rows = sweep(path, executor, tables.append)
        Console().print(tables[-1])
        return rows
    with Live(console=console, auto_refresh=False) as live:
        return sweep(path, executor, lambda table: live.update(table, refresh=True))


@dataclass
class Tracked:
    """A run and its latest job."""

    run: SweepRun
    state: State = "waiting"
    attempts: int = 0
    """Attempts in this start of the sweep."""
    job: submitit.Job | None = None
    missing_since: float | None = None
    gpus: list[str] = field(default_factory=list)
    """GPUs of this machine that a local run has to itself."""
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def latest_job(self) -> submitit.Job:
        """Latest job of a run that was submitted."""
        assert self.job is not None
        return self.job


class Sweep:
    """The runs of one sweep."""

    def __init__(self, config: SweepConfig, runs: list[SweepRun], executor: Literal["slurm", "local"]):
        self._config, self._executor_name = config, executor
        self._directory = Path(config.directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tracked = [Tracked(run) for run in runs]
        self._executor = self._make_slurm_executor() if executor == "slurm" else self._make_local_executor()
        self._gpus = _visible_gpus() if executor == "local" else []
        self._concurrent = self._fitting_runs()

    def run(self, report: Callable[[Table], None]) -> list[dict]:
        """Runs what is not finished; the rows of the table. Raises UserError while another process runs the sweep, for
        a finished run of other settings, and when Slurm takes no job."""
        try:
            with FileLock(self._directory / "sweep.lock", blocking=False):
                self._check_finished_runs()
                self._follow_earlier_jobs()
                return self._run(report)
        except Timeout:
            raise UserError(
                f"{self._directory}: another process runs this sweep; wait for its end, or give this one a directory "
                "of its own (directory: ...)."
            ) from None

    def _run(self, report: Callable[[Table], None]) -> list[dict]:
        shown = None
        try:
            while True:
                self._update()
                rows = self._rows()
                if rows != shown:
                    shown = rows
                    self._write_csv(rows)
                    report(self._table(rows))
                if all(tracked.state in ("finished", "failed") for tracked in self._tracked):
                    return rows
                time.sleep(POLL_SECONDS[self._executor_name])
        except BaseException:
            # Slurm's jobs continue without this process, and the next start follows them.
            if self._executor_name == "local":
                self._stop_local_runs()
            raise

    def _update(self) -> None:
        listed = _slurm_jobs() if self._executor_name == "slurm" else set()
        if listed is None:
            return
        for tracked in self._tracked:
            if tracked.state in ("waiting", "submitted"):
                tracked.metrics = _last_metrics(tracked.run.directory)
            if tracked.state == "submitted" and self._has_ended(tracked, listed):
                tracked.metrics = _last_metrics(tracked.run.directory)
                tracked.state = self._state_after(tracked)
            elif tracked.state == "waiting" and not tracked.attempts and _is_complete(tracked):
                tracked.state = "finished"
        free = self._concurrent - sum(tracked.state == "submitted" for tracked in self._tracked)
        waiting = [tracked for tracked in self._tracked if tracked.state == "waiting"]
        # Seed by seed: what is finished then compares all settings.
        waiting.sort(key=lambda tracked: self._config.seeds.index(tracked.run.differences[SEED]))
        for tracked in waiting[: max(free, 0)]:
            self._submit(tracked)

    def _stop_local_runs(self) -> None:
        """Makes the local runs save themselves and end, and waits for that."""
        submitted = [tracked.latest_job for tracked in self._tracked if tracked.state == "submitted"]
        jobs = [job for job in submitted if not job.done()]
        if jobs:
            print(f"meds: the sweep stops when its {len(jobs)} runs have saved themselves", file=sys.stderr)
        for job in jobs:
            # submitit's controller passes it on to `_train_here`.
            os.kill(int(job.job_id), signal.SIGTERM)
        while not all(job.done() for job in jobs):
            time.sleep(0.2)

    def _state_after(self, tracked: Tracked) -> State:
        try:
            job = tracked.latest_job
            code = job.result() if job.paths.result_pickle.exists() else None
        except submitit.core.utils.FailedJobError:
            code = None
        if code == 0 and _is_complete(tracked):
            return "finished"
        return "waiting" if tracked.attempts <= self._config.retries else "failed"

    def _has_ended(self, tracked: Tracked, listed: set[str]) -> bool:
        if self._executor_name == "local":
            return tracked.latest_job.done()
        if tracked.latest_job.job_id in listed:
            tracked.missing_since = None
            return False
        # The job's last files may show up on this machine later than its end.
        tracked.missing_since = tracked.missing_since or time.monotonic()
        has_result = tracked.latest_job.paths.result_pickle.exists()
        return has_result or time.monotonic() - tracked.missing_since > LOST_SECONDS

    def _submit(self, tracked: Tracked) -> None:
        run, job = tracked.run, self._config.job
        if self._executor_name == "local":
            tracked.gpus = self._free_gpus()
            visible = ",".join(tracked.gpus) if tracked.gpus else os.environ.get("CUDA_VISIBLE_DEVICES")
            # The runs' processes inherit that Ctrl-C is ignored: this one decides how they end.
            with _ignoring_interrupts():
                tracked.job = self._executor.submit(_train_here, run.arguments, visible)
        else:
            self._executor.update_parameters(job_name=run.name)
            try:
                tracked.job = self._executor.submit(
                    _train_in_slurm, run.arguments, list(job.srun), job.python or sys.executable
                )
            except submitit.core.utils.FailedJobError as error:
                reason = str(error).strip().splitlines()[-1]
                raise UserError(f"Slurm does not take the job of the run {run.name}: {reason}") from error
        tracked.state, tracked.missing_since = "submitted", None
        tracked.attempts += 1
        jobs = {entry.run.name: entry.job.job_id for entry in self._tracked if entry.job is not None}
        atomic.write_text(self._directory / "jobs.json", json.dumps(jobs | {"executor": self._executor_name}, indent=1))

    def _check_finished_runs(self) -> None:
        """An unfinished run of other settings is refused by its trainer."""
        for tracked in self._tracked:
            directory = tracked.run.directory
            tracked.metrics = _last_metrics(directory)
            if not _is_complete(tracked):
                continue
            if other := make_another_run(load_config(RunPaths(directory).config), tracked.run.config):
                raise UserError(
                    f"{directory}: this finished run has other settings ({'; '.join(other)}); set them back, remove "
                    "it, or give the sweep a directory of its own (directory: ...)."
                )

    def _follow_earlier_jobs(self) -> None:
        file = self._directory / "jobs.json"
        jobs = json.loads(file.read_text()) if file.exists() else {}
        if self._executor_name != "slurm" or jobs.get("executor") != "slurm":
            return
        while (listed := _slurm_jobs()) is None:
            time.sleep(POLL_SECONDS["slurm"])
        for tracked in self._tracked:
            if (job := jobs.get(tracked.run.name)) in listed:
                tracked.job = submitit.SlurmJob(folder=self._directory / "jobs", job_id=job)
                tracked.state, tracked.attempts = "submitted", 1

    def _fitting_runs(self) -> int:
        """Runs at a time: those of the config, or as many as this machine has GPUs for."""
        needed = self._config.job.gpus_per_node
        if not (self._gpus and needed):
            return self._config.concurrent
        if needed > len(self._gpus):
            raise UserError(
                f"a run needs job.gpus_per_node = {needed}, but this machine has {len(self._gpus)} GPUs; lower it, and "
                "cluster.ranks_per_node with it."
            )
        return min(self._config.concurrent, len(self._gpus) // needed)

    def _free_gpus(self) -> list[str]:
        taken = [gpu for tracked in self._tracked if tracked.state == "submitted" for gpu in tracked.gpus]
        return [gpu for gpu in self._gpus if gpu not in taken][: self._config.job.gpus_per_node]

    def _make_local_executor(self) -> submitit.LocalExecutor:
        executor = submitit.LocalExecutor(self._directory / "jobs")
        executor.update_parameters(timeout_min=LOCAL_MINUTES)
        return executor

    def _make_slurm_executor(self) -> submitit.SlurmExecutor:
        job = self._config.job
        if not shutil.which("sbatch"):
            raise UserError(
                "there is no sbatch on this machine; run the sweep on a login node, or with --executor local."
            )
        # `exec`: the signal before the end of the time goes to the process that the batch script is.
        executor = submitit.SlurmExecutor(self._directory / "jobs", python=f"exec {sys.executable}")
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
        executor.update_parameters(
            nodes=job.nodes,
            ntasks_per_node=1,
            time=round(job.hours * 60),
            stderr_to_stdout=True,
            use_srun=False,
            additional_parameters=extra,
            **{key: value for key, value in optional.items() if value is not None},
        )
        return executor

    def _rows(self) -> list[dict]:
        """A row a run: its settings, state, last step and metrics. Which machine did the work makes no difference."""
        return [
            {
                "run": tracked.run.name,
                **tracked.run.differences,
                "state": tracked.state,
                "step": int(tracked.metrics.get("step", 0)),
                **{name: tracked.metrics.get(name) for name in self._config.metrics},
            }
            for tracked in self._tracked
        ]

    def _table(self, rows: list[dict]) -> Table:
        table = Table(title=self._config.name)
        columns = list(dict.fromkeys(column for row in rows for column in row if column != "run"))
        for column in ("run", *columns):
            table.add_column(column.rpartition(".")[2])
        for row in rows:
            table.add_row(row["run"], *(_cell(row.get(column)) for column in columns))
        return table

    def _write_csv(self, rows: list[dict]) -> None:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with atomic.open_atomic(self._directory / "results.csv", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


def _train_in_slurm(arguments: list[str], srun_options: list[str], python: str) -> int:
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


def _train_here(arguments: list[str], visible: str | None) -> int:
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


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]


def _slurm_jobs() -> set[str] | None:
    """Ids of all jobs of this user that are queued or running; None when Slurm does not answer."""
    jobs = present_jobs()
    if jobs is None:
        print("meds: squeue does not answer; asking again", file=sys.stderr)
    return jobs


def _is_complete(tracked: Tracked) -> bool:
    return tracked.metrics.get("step", -1) >= tracked.run.steps


def _last_metrics(directory: Path) -> dict[str, Any]:
    """The last value of every metric of a run."""
    values: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        for line in read_metrics(RunPaths(directory).metrics):
            values |= line.values
    return values


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
