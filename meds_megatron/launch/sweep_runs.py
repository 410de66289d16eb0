"""Runs of a sweep, submitted with submitit to Slurm or to this machine's processes, and the table of their results.

What is finished is read from the runs' own directories, so a sweep that is started again goes on where it stopped:
finished runs are left alone, jobs that are still queued or running are followed, others are submitted.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit
from rich.console import Console
from rich.live import Live
from rich.table import Table

from meds_megatron.errors import UserError
from meds_megatron.launch.job import run_job
from meds_megatron.launch.slurm import EXIT_REQUEUE, SlurmJob
from meds_megatron.launch.sweep_config import SweepConfig, SweepRun, expand, load_sweep

POLL_SECONDS = 2.0
LOST_SECONDS = 30.0
"""After which a job that Slurm no longer lists, and that has left no result, counts as failed."""

Executor = Literal["auto", "slurm", "local"]
State = Literal["waiting", "submitted", "finished", "failed"]


def sweep(path: str | Path, executor: Executor = "auto", report: Callable[[Table], None] | None = None) -> list[dict]:
    """Runs the sweep in a YAML file to its end; the rows of its table, which `directory`/results.csv holds too.

    `auto` submits to Slurm where there is an sbatch. `report` is called with the table whenever it changes. Raises
    UserError for a mistake in the file, before any run is submitted.
    """
    config = load_sweep(path)
    runs = expand(config, path)
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
    """In this start of the sweep."""
    job: submitit.Job | None = None
    missing_since: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Sweep:
    """The runs of one sweep."""

    def __init__(self, config: SweepConfig, runs: list[SweepRun], executor: Literal["slurm", "local"]):
        self._config, self._executor_name = config, executor
        self._directory = Path(config.directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tracked = [Tracked(run) for run in runs]
        self._executor = self._make_executor()
        self._follow_earlier_jobs()

    def run(self, report: Callable[[Table], None]) -> list[dict]:
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
                time.sleep(POLL_SECONDS)
        except BaseException:
            # Slurm's jobs go on without this process, and the next start follows them.
            if self._executor_name == "local":
                for tracked in self._tracked:
                    if tracked.state == "submitted":
                        tracked.job.cancel()
            raise

    def _update(self) -> None:
        listed = _slurm_jobs() if self._executor_name == "slurm" else None
        for tracked in self._tracked:
            if tracked.state in ("waiting", "submitted"):
                tracked.metrics = _last_metrics(tracked.run.directory)
            if tracked.state == "submitted" and self._has_ended(tracked, listed):
                tracked.metrics = _last_metrics(tracked.run.directory)
                tracked.state = self._state_after(tracked)
            elif tracked.state == "waiting" and not tracked.attempts and _is_complete(tracked):
                tracked.state = "finished"
        free = self._config.concurrent - sum(tracked.state == "submitted" for tracked in self._tracked)
        for tracked in [tracked for tracked in self._tracked if tracked.state == "waiting"][: max(free, 0)]:
            self._submit(tracked)

    def _state_after(self, tracked: Tracked) -> State:
        try:
            code = tracked.job.result() if tracked.job.paths.result_pickle.exists() else None
        except submitit.core.utils.FailedJobError:
            code = None
        if code == 0 and _is_complete(tracked):
            return "finished"
        return "waiting" if tracked.attempts <= self._config.retries else "failed"

    def _has_ended(self, tracked: Tracked, listed: set[str] | None) -> bool:
        if listed is None:
            return tracked.job.done()
        if tracked.job.job_id in listed:
            tracked.missing_since = None
            return False
        # The job's last files may show up on this machine later than its end.
        tracked.missing_since = tracked.missing_since or time.monotonic()
        return tracked.job.paths.result_pickle.exists() or time.monotonic() - tracked.missing_since > LOST_SECONDS

    def _submit(self, tracked: Tracked) -> None:
        function = _train_in_slurm if self._executor_name == "slurm" else _train_here
        if self._executor_name == "slurm":
            self._executor.update_parameters(job_name=tracked.run.name)
        tracked.job = self._executor.submit(function, tracked.run.arguments, list(self._config.job.srun))
        tracked.state, tracked.missing_since = "submitted", None
        tracked.attempts += 1
        jobs = {entry.run.name: entry.job.job_id for entry in self._tracked if entry.job is not None}
        _write(self._directory / "jobs.json", json.dumps(jobs | {"executor": self._executor_name}, indent=1))

    def _follow_earlier_jobs(self) -> None:
        file = self._directory / "jobs.json"
        jobs = json.loads(file.read_text()) if file.exists() else {}
        if self._executor_name != "slurm" or jobs.get("executor") != "slurm":
            return
        listed = _slurm_jobs()
        for tracked in self._tracked:
            if (job := jobs.get(tracked.run.name)) in listed:
                tracked.job = submitit.SlurmJob(folder=self._directory / "jobs", job_id=job)
                tracked.state, tracked.attempts = "submitted", 1

    def _make_executor(self) -> submitit.Executor:
        folder, job = self._directory / "jobs", self._config.job
        if self._executor_name == "local":
            executor = submitit.LocalExecutor(folder)
            executor.update_parameters(timeout_min=round(job.hours * 60))
            return executor
        if not shutil.which("sbatch"):
            raise UserError(
                "there is no sbatch on this machine; run the sweep on a login node, or with --executor local."
            )
        # `exec`: the signal before the end of the time goes to the process that the batch script is.
        executor = submitit.SlurmExecutor(folder, python=f"exec {sys.executable}")
        # submitit's own signal is not used: `launch.job` saves, and requeues the job.
        extra: dict[str, Any] = {"signal": f"B:USR1@{job.save_seconds}", "requeue": True}
        optional = {
            "partition": job.partition,
            "account": job.account,
            "cpus_per_task": job.cpus_per_task,
            "gpus_per_node": job.gpus_per_node or None,
            "exclusive": job.exclusive or None,
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
        partial = self._directory / f"results.csv.{os.getpid()}.partial"
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self._directory / "results.csv")


def _train_in_slurm(arguments: list[str], srun_options: list[str]) -> int:
    """The batch process of a run's job. The exit code of the run."""
    code = run_job(SlurmJob.from_environment(), srun_options, sys.executable, arguments)
    if code == EXIT_REQUEUE:
        # Slurm ends this process; a result now would make the job a finished one.
        signal.pause()
    return code


def _train_here(arguments: list[str], _: list[str]) -> int:
    command = [sys.executable, "-m", "meds_megatron.cli", "train", *arguments]
    return subprocess.run(command).returncode


def _slurm_jobs() -> set[str]:
    """Ids of all jobs of this user that are queued or running."""
    listed = subprocess.run(["squeue", "--me", "--noheader", "--format=%i"], capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def _is_complete(tracked: Tracked) -> bool:
    return tracked.metrics.get("step", -1) >= tracked.run.steps


def _last_metrics(directory: Path) -> dict[str, float]:
    """The last value of every metric of a run."""
    values: dict[str, float] = {}
    with suppress(FileNotFoundError), open(directory / "metrics.jsonl", encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):  # The last one may be being written.
                values |= json.loads(line)
    return values


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
