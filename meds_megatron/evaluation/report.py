"""Report of an evaluation: a table on the terminal, a csv file, and a plot of pass@k against k."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from meds_megatron import atomic
from meds_megatron.evaluation.summary import Summary

LINE_STYLES = ("-", "--", ":")


def table(summaries: Sequence[Summary]) -> Table:
    """A row for each metric, a section for each data set and grader."""
    shown = Table("problems", "grader", "failed", "metric", "value, 95 % interval")
    for summary in summaries:
        start = [f"{summary.dataset} ({summary.problems})", summary.grader, str(summary.errors)]
        for metric in summary.metrics:
            shown.add_row(*start, metric.name, f"{metric.value:.3f} ({metric.low:.3f}-{metric.high:.3f})")
            start = [""] * len(start)
        shown.add_section()
    return shown


def write_csv(summaries: Sequence[Summary], path: Path) -> None:
    """A line for each data set, grader and metric; the file appears whole or not at all."""
    with atomic.open_atomic(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "grader", "problems", "responses", "failed", "metric", "value", "low", "high"])
        for summary in summaries:
            start = [summary.dataset, summary.grader, summary.problems, summary.responses, summary.errors]
            writer.writerows([*start, metric.name, metric.value, metric.low, metric.high] for metric in summary.metrics)


def plot_pass_at_k(summaries: Sequence[Summary], path: Path, title: str) -> None:
    """pass@k against k with its interval, a line for each data set and grader, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    graders = list(dict.fromkeys(summary.grader for summary in summaries))
    ks = sorted({k for summary in summaries for k in summary.pass_at()})
    for summary in summaries:
        curve = summary.pass_at()
        label = f"{summary.dataset}, {summary.grader}" if len(graders) > 1 else summary.dataset
        # Graders that agree lie on one another.
        style = LINE_STYLES[graders.index(summary.grader) % len(LINE_STYLES)]
        values = [metric.value for metric in curve.values()]
        (line,) = axes.plot(list(curve), values, style, marker="o", label=label)
        low, high = ([getattr(metric, side) for metric in curve.values()] for side in ("low", "high"))
        axes.fill_between(list(curve), low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("k (responses)")
    axes.set_ylabel("pass@k")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic.open_atomic(path, "wb") as file:
        figure.savefig(file, dpi=150, format="png")
    pyplot.close(figure)
