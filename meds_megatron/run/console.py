"""Progress of a run: a live view on a terminal, one plain line a step anywhere else."""

import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from meds_megatron.config import Config

TABLE_ROWS = 10
BAR_WIDTH = 60
SHORTEST_SECONDS = 0.05
"""Shortest phase that a line of a log shows."""
SPARKS = "▁▂▃▄▅▆▇█"
PHASE_COLOURS = {
    "rollout": "cyan",
    "reward": "yellow",
    "forward": "blue",
    "memory": "magenta",
    "update": "green",
    "sync": "red",
    "validation": "bright_black",
}
COLUMNS = {  # heading: (metric, format)
    "accuracy": ("accuracy/mean", "{:.3f}"),
    "reward": ("reward/mean", "{:.3f}"),
    "penalty": ("reward/penalty_mean", "{:.4f}"),
    "seen": ("memory/lookup_size_mean", "{:.1f}"),
    "entropy": ("policy/entropy", "{:.3f}"),
    "tokens/s": ("throughput/tokens_per_second", "{:,.0f}"),
    "seconds": ("time/step", "{:.1f}"),
}


class Console:
    """Shows the progress of a run; a context manager.

    `phase(name)` shows the phase under way, `step(step, metrics)` a finished step, `note(text)` one sentence that must
    not be missed. Metrics have the names of `metrics.jsonl`; step 0 is the validation before training.
    """

    def __init__(self, config: Config, file: TextIO | None = None, rich: RichConsole | None = None):
        """Output goes to `file` (default: the standard output), or to a console of rich's own."""
        self._name = config.name
        self._rich = rich or RichConsole(file=file, highlight=False)
        self._steps = config.train.steps
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=TABLE_ROWS)
        self._accuracy: list[float] = []
        self._validation: list[tuple[int, float]] = []
        self._started = time.monotonic()
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("[bold]{task.fields[run]}[/]"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[clock]}"),
            TextColumn("[dim]{task.fields[phase]}[/]"),
            console=self._rich,
            expand=True,
        )
        self._task = self._progress.add_task("", total=self._steps, run=self._name, clock="", phase="starting")
        self._live = Live(self, console=self._rich, refresh_per_second=4) if self._rich.is_terminal else None

    def __enter__(self) -> "Console":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.phase("stopped" if kind else "done")
        if self._live:
            self._live.stop()

    def phase(self, name: str) -> None:
        self._progress.update(self._task, phase=name)

    def note(self, text: str) -> None:
        self._rich.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if "validation/accuracy" in metrics:
            self._validation.append((step, metrics["validation/accuracy"]))
        if step > 0:
            self._rows.append((step, metrics))
            self._accuracy.append(metrics.get("accuracy/mean", 0.0))
        self._progress.update(self._task, completed=step)
        if not self._live:
            self._rich.print(Text(self._line(step, metrics)), soft_wrap=True)

    def __rich__(self) -> Group:
        """The live view, as it is now."""
        self._progress.update(self._task, clock=self._clock())
        parts: list[RenderableType] = [self._progress]
        if self._rows:
            parts += ["", self._table(), "", self._curve(), self._phase_bar(self._rows[-1][1])]
        if self._validation:
            parts.append(self._validation_line())
        return Group(*parts)

    def _clock(self) -> str:
        elapsed = time.monotonic() - self._started
        times = [metrics["time/step"] for _, metrics in self._rows if "time/step" in metrics]
        steps_left = self._steps - self._rows[-1][0] if self._rows else 0
        if not times or not steps_left:
            return _duration(elapsed)
        return f"{_duration(elapsed)}, {_duration(sum(times) / len(times) * steps_left)} left"

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2), header_style="bold", expand=False)
        table.add_column("step", justify="right")
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        for step, metrics in self._rows:
            table.add_row(str(step), *(_cell(metrics, *column) for column in COLUMNS.values()))
        return table

    def _curve(self) -> Text:
        recent = self._accuracy[-BAR_WIDTH:]
        sparks = "".join(SPARKS[min(int(accuracy * len(SPARKS)), len(SPARKS) - 1)] for accuracy in recent)
        return Text.assemble(("  accuracy  ", "bold"), (sparks, "green"), f"  {recent[-1]:.3f}")

    def _phase_bar(self, metrics: Mapping[str, float]) -> Text:
        """The last step's time as one bar, divided by phase; a phase too short to be visible is left out."""
        phases = _phases(metrics)
        total = max(metrics.get("time/step", 0.0), sum(phases.values()), 1e-9)
        bar, legend = Text.assemble(("  time      ", "bold")), Text(" " * 12)
        for name, seconds in phases.items():
            if length := round(BAR_WIDTH * seconds / total):
                colour = PHASE_COLOURS.get(name, "white")
                bar.append("█" * length, style=colour)
                legend.append("■ ", style=colour).append(f"{name} {seconds:.1f}s  ")
        return bar.append("\n").append_text(legend)

    def _validation_line(self) -> Text:
        first, last = self._validation[0], self._validation[-1]
        text = Text.assemble(("  validation", "bold"), f"  {last[1]:.3f} at step {last[0]}")
        if last is not first:
            best = max(self._validation, key=lambda point: point[1])
            text.append(f"  (first {first[1]:.3f}, best {best[1]:.3f} at step {best[0]})", style="dim")
        return text

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        """A step as one line for logs."""
        parts = [f"step {step}/{self._steps}"]
        parts += [f"{heading} {_cell(metrics, *column)}" for heading, column in COLUMNS.items() if column[0] in metrics]
        phases = [f"{name} {seconds:.1f}" for name, seconds in _phases(metrics).items() if seconds >= SHORTEST_SECONDS]
        if phases:
            parts.append(f"({', '.join(phases)})")
        if "validation/accuracy" in metrics:
            parts.append(f"validation {metrics['validation/accuracy']:.3f}")
        parts.append(f"after {self._clock()}")
        return "  ".join(parts)


class ConsoleHandler(logging.Handler):
    """Shows log records as notes."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.note(self.format(record))


def _phases(metrics: Mapping[str, float]) -> dict[str, float]:
    """Seconds by phase, in the order in which the phases were timed."""
    times = {name.removeprefix("time/"): seconds for name, seconds in metrics.items() if name.startswith("time/")}
    times.pop("step", None)
    return times


def _cell(metrics: Mapping[str, float], name: str, form: str) -> str:
    return form.format(metrics[name]) if name in metrics else "-"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
