"""The study's results: means and intervals of the recorded runs, differences from DAPO, a table and a picture."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student_t
from study_departures import Observation, effects
from study_plan import COMPARISONS, CONFIRMATION_TASK, DEPARTURES, DEPARTURES_TASK, METHODS, SWEEPS, planned_runs
from study_records import digest, method_of, read_records

from meds_megatron import atomic

MEASURES = (
    *("pass@1", "pass@n", "wrong_answers", "eigenvalue_ratio", "ari_fingerprint", "ari_answer"),
    *("saturated", "clusters", "minutes"),
)
CONTROL = "dapo"
"""Method that the others are compared with, run by run of the same seed."""
GAINS = {f"{measure} − {CONTROL}": measure for measure in ("pass@1", "pass@n")}
"""Measures of the differences from CONTROL, by the name of the difference."""
FEWEST = 3
"""Differences of a method whose interval is drawn: that of two is too wide to be of use and hides the others."""
COLUMNS = (*MEASURES[:2], *GAINS, *MEASURES[2:])
"""Columns of the table."""


def collect_results(directory: Path) -> dict[str, Any]:
    """Results by comparison and method: the recorded runs, and mean and half-width of each measure's 95 % interval over
    their seeds (Student's t; null with fewer than two), also of the differences from CONTROL's runs with the same seed
    and start; runs of one seed on several machines count as their mean. `departures` are the effects of DEPARTURES on
    each of GAINS' measures. `missing` are the planned runs that are not recorded, by sweep and method, how many."""
    records = read_records(directory)
    results: dict[str, Any] = {"comparisons": {}, "departures": {}, "missing": {}}
    for name in SWEEPS:
        methods: dict[str, list[dict[str, Any]]] = {}
        for run in planned_runs(directory, name)[1]:
            found = records.get(digest(run), [])
            methods.setdefault(method_of(run), []).extend(found)
            if not found:
                results["missing"].setdefault(name, Counter())[method_of(run)] += 1
        if name in COMPARISONS:
            results["comparisons"][name] = summaries_of(methods)
        else:
            results["departures"] = effects_of(methods)
    return results


def summaries_of(methods: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Summaries by method that has runs: these, the number of seeds with pairs, and the means and intervals."""
    summaries = {}
    for name, runs in methods.items():
        differences = [] if name == CONTROL else differences_of(runs, methods.get(CONTROL, []))
        if runs:
            summary = {
                measure: over_seeds([(run["seed"], run["measures"][measure]) for run in runs]) for measure in MEASURES
            }
            for gain, measure in GAINS.items():
                summary[gain] = over_seeds([(seed, difference[measure]) for seed, difference in differences])
            summaries[name] = {"runs": runs, "pairs": len({seed for seed, _ in differences}), "summary": summary}
    return summaries


def effects_of(combinations: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The number of runs of combinations of DEPARTURES, and each departure's effect on GAINS' measures."""
    runs = [
        (frozenset(DEPARTURES) & frozenset(name.split("+")), (run["seed"], str(run["start"])), run["measures"])
        for name, found in combinations.items()
        for run in found
    ]
    by_measure = {
        measure: effects(list(DEPARTURES), [Observation(on, block, made[measure]) for on, block, made in runs])
        for measure in GAINS.values()
    }
    return {"runs": len(runs), "effects": by_measure}


def differences_of(runs: list[dict[str, Any]], control: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Seed and difference in GAINS' measures of the runs that have a counterpart in the control.

    Runs with the same seed and the same validation before the first step have model, data, order and first responses
    in common, so their differences vary less than the runs do. The model differs where another type of processor has
    made it.
    """
    return [
        (run["seed"], {measure: run["measures"][measure] - other["measures"][measure] for measure in GAINS.values()})
        for run in runs
        for other in control
        if run["start"] is not None and (run["seed"], run["start"]) == (other["seed"], other["start"])
    ]


def over_seeds(measured: list[tuple[int, float | None]]) -> list[float | None]:
    """Mean and interval of the seeds' means."""
    by_seed: dict[int, list[float]] = {}
    for seed, value in measured:
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    return mean_and_interval([float(np.mean(values)) for values in by_seed.values()])


def mean_and_interval(values: list[float]) -> list[float | None]:
    """Mean of the values, and half-width of its 95 % interval."""
    if not values:
        return [None, None]
    mean = float(np.mean(values))
    if len(values) < 2:
        return [mean, None]
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return [mean, error * float(student_t.ppf(0.975, len(values) - 1))]


def table_of(results: dict[str, Any]) -> str:
    """The results as Markdown: a table for each comparison, and one of the departures' effects."""
    lines = []
    for comparison, methods in results["comparisons"].items():
        lines += [f"### {title_of(comparison)}", ""]
        if methods:
            lines += ["| method | runs | pairs | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
        for name, method in methods.items():
            cells = [_cell(*method["summary"][column]) for column in COLUMNS]
            lines.append(f"| {name} | {len(method['runs'])} | {method['pairs'] or '–'} | " + " | ".join(cells) + " |")
        lines += [""] if methods else []
        lines += _missing_of(results, comparison)
    departures = results["departures"]
    lines += [f"### {DEPARTURES_TASK}: effect of each departure, from {departures['runs']} runs", ""]
    by_measure = departures["effects"]
    lines += ["| departure | " + " | ".join(by_measure) + " |", "|---" * (1 + len(by_measure)) + "|"]
    for name in DEPARTURES:
        cells = [_cell(*(found[name] or (None, None))) for found in by_measure.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_missing_of(results, SWEEPS[-1])])


def _missing_of(results: dict[str, Any], name: str) -> list[str]:
    missing = results["missing"].get(name, {})
    return [f"Not run yet: {', '.join(f'{run} ({count})' for run, count in missing.items())}.", ""] if missing else []


def _cell(mean: float | None, interval: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:z.3f}" if interval is None else f"{mean:z.3f} ± {interval:.3f}"


def title_of(comparison: str) -> str:
    return f"{CONFIRMATION_TASK}, once more with new seeds" if comparison == "confirmation" else comparison


class Point(NamedTuple):
    """A change of pass@1 and pass@n: means, and half-widths of their intervals where these are shown."""

    name: str
    label: str
    means: tuple[float, float]
    intervals: tuple[float | None, float | None]


def draw(results: dict[str, Any], path: Path) -> None:
    """Changes of pass@1 and pass@n: a panel for each comparison that was run, against CONTROL's runs, and one of the
    departures' effects."""
    from matplotlib.figure import Figure

    panels = {title_of(name): points_of(methods) for name, methods in results["comparisons"].items() if methods}
    if effects_known := points_of_effects(results["departures"]["effects"]):
        panels[f"{DEPARTURES_TASK}, effect of each departure"] = effects_known
    names = [*METHODS, *DEPARTURES]
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(14, 5 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for (title, points), panel in zip(panels.items(), axes, strict=False):
        panel.axhline(0, color="0.8", zorder=0)
        panel.axvline(0, color="0.8", zorder=0)
        for point in points:
            (x, y), (x_half, y_half) = point.means, point.intervals
            style = {"fmt": "o", "capsize": 2, "color": f"C{names.index(point.name)}"}
            panel.errorbar(x, y, xerr=x_half, yerr=y_half, label=point.label, **style)
        panel.set(title=title, xlabel="change of pass@1", ylabel="change of pass@n")
        panel.locator_params(axis="x", nbins=5)
        if points:
            panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for panel in axes:
        panel.set_axis_off()
    with atomic.open_atomic(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def points_of(methods: dict[str, Any]) -> list[Point]:
    """The methods that have differences from CONTROL, by these; intervals of those that have FEWEST or more."""
    points = []
    for name, method in methods.items():
        (x, x_half), (y, y_half) = (method["summary"][gain] for gain in GAINS)
        if name != CONTROL and x is not None:
            intervals = (x_half, y_half) if method["pairs"] >= FEWEST else (None, None)
            points.append(Point(name, f"{name} ({method['pairs']} pairs)", (x, y), intervals))
    return points


def points_of_effects(by_measure: dict[str, dict[str, tuple[float, float] | None]]) -> list[Point]:
    """The departures whose effects are known."""
    points = []
    for name in DEPARTURES:
        across, up = (found[name] for found in by_measure.values())
        if across is not None and up is not None:
            points.append(Point(name, name, (across[0], up[0]), (across[1], up[1])))
    return points
