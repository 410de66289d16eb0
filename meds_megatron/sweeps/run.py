"""A sweep: its runs, submitted as there is room for them, and the table of their results.

What is finished is read from the runs' own directories, so a sweep that is started again continues where it stopped:
finished runs are left alone, jobs that are still queued or running are followed, others are submitted.
"""

import json
import shutil
import time
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import submitit
from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table

from meds_megatron import atomic
from meds_megatron.config import load_config
from meds_megatron.config.changes import make_another_run
from meds_megatron.errors import UserError
from meds_megatron.run.metrics_file import read_metrics
from meds_megatron.run.paths import RunPaths
from meds_megatron.sweeps.config import SEED, SweepConfig, SweepRun, expand, load_sweep
from meds_megatron.sweeps.executors import Executor, LocalExecutor, SlurmExecutor
from meds_megatron.sweeps.table import table_of, write_csv

ExecutorName = Literal["auto", "slurm", "local"]
State = Literal["waiting", "submitted", "finished", "failed"]


def sweep(
    path: str | Path,
    executor: ExecutorName = "auto",
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
    made = SlurmExecutor if executor == "slurm" else LocalExecutor
    return Sweep(config, runs, made(Path(config.directory) / "jobs", config.job)).run(report or (lambda table: None))


def sweep_with_live_table(path: str | Path, executor: ExecutorName) -> list[dict]:
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
    metrics: dict[str, Any] = field(default_factory=dict)
    """Last value of every metric."""

    @property
    def latest_job(self) -> submitit.Job:
        """Latest job of a run that was submitted."""
        assert self.job is not None
        return self.job

    @property
    def is_complete(self) -> bool:
        return self.metrics.get("step", -1) >= self.run.steps

    def read_metrics(self) -> None:
        self.metrics = last_metrics(self.run.directory)


class Sweep:
    """The runs of one sweep."""

    def __init__(self, config: SweepConfig, runs: list[SweepRun], executor: Executor):
        self._config, self._executor = config, executor
        self._directory = Path(config.directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._tracked = [Tracked(run) for run in runs]
        self._concurrent = min(config.concurrent, executor.most_at_a_time or config.concurrent)

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
                    write_csv(rows, self._directory / "results.csv")
                    report(table_of(self._config.name, rows))
                if all(tracked.state in ("finished", "failed") for tracked in self._tracked):
                    return rows
                time.sleep(self._executor.poll_seconds)
        except BaseException:
            self._executor.stop([tracked.latest_job for tracked in self._submitted])
            raise

    @property
    def _submitted(self) -> list[Tracked]:
        return [tracked for tracked in self._tracked if tracked.state == "submitted"]

    def _update(self) -> None:
        if not self._executor.refresh():
            return
        for tracked in self._tracked:
            if tracked.state in ("waiting", "submitted"):
                tracked.read_metrics()
            if tracked.state == "submitted" and self._executor.has_ended(tracked.latest_job):
                tracked.read_metrics()
                tracked.state = self._state_after(tracked)
            elif tracked.state == "waiting" and not tracked.attempts and tracked.is_complete:
                tracked.state = "finished"
        free = self._concurrent - len(self._submitted)
        waiting = [tracked for tracked in self._tracked if tracked.state == "waiting"]
        # Seed by seed: what is finished then compares all settings.
        waiting.sort(key=lambda tracked: self._config.seeds.index(tracked.run.differences[SEED]))
        for tracked in waiting[: max(free, 0)]:
            self._submit(tracked)

    def _state_after(self, tracked: Tracked) -> State:
        try:
            job = tracked.latest_job
            code = job.result() if job.paths.result_pickle.exists() else None
        except submitit.core.utils.FailedJobError:
            code = None
        if code == 0 and tracked.is_complete:
            return "finished"
        return "waiting" if tracked.attempts <= self._config.retries else "failed"

    def _submit(self, tracked: Tracked) -> None:
        tracked.job = self._executor.submit(tracked.run)
        tracked.state = "submitted"
        tracked.attempts += 1
        jobs = {entry.run.name: entry.job.job_id for entry in self._tracked if entry.job is not None}
        content = json.dumps(jobs | {"executor": self._executor.name}, indent=1)
        atomic.write_text(self._directory / "jobs.json", content)

    def _check_finished_runs(self) -> None:
        """An unfinished run of other settings is refused by its trainer."""
        for tracked in self._tracked:
            directory = tracked.run.directory
            tracked.read_metrics()
            if not tracked.is_complete:
                continue
            if other := make_another_run(load_config(RunPaths(directory).config), tracked.run.config):
                raise UserError(
                    f"{directory}: this finished run has other settings ({'; '.join(other)}); set them back, remove "
                    "it, or give the sweep a directory of its own (directory: ...)."
                )

    def _follow_earlier_jobs(self) -> None:
        file = self._directory / "jobs.json"
        jobs = json.loads(file.read_text()) if file.exists() else {}
        if jobs.pop("executor", None) != self._executor.name:
            return
        earlier = self._executor.earlier_jobs(jobs)
        for tracked in self._tracked:
            if tracked.run.name in earlier:
                tracked.job = earlier[tracked.run.name]
                tracked.state, tracked.attempts = "submitted", 1

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


def last_metrics(directory: Path) -> dict[str, Any]:
    """The last value of every metric of a run."""
    values: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        for line in read_metrics(RunPaths(directory).metrics):
            values |= line.values
    return values
