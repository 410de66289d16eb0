"""Study of MEDS and its rivals on the two embedded tasks: runs, measures, a table and a picture.

    python tools/study.py plan DIR            # writes sweep files: DIR/per_kind.yaml, remainder.yaml and departures.yaml
    python tools/study.py run DIR             # trains what is not recorded, here or as Slurm jobs (--executor slurm)
    python tools/study.py results DIR         # writes DIR/results.md and DIR/results.png

`DIR/runs.jsonl` has a line for every finished run: its measures (`study_measures.py`), a digest of its settings and the
commit of its code. Runs themselves are in a directory of their own (`plan --runs`) and are not needed afterwards: `run`
leaves out what is recorded with the same settings, `results` reads the records alone, and records of other settings
count in neither. So the files of DIR carry a study from one machine to another. Runs of the first seed come first, then
those of the second: whatever is finished compares all methods.

The first two sweeps train all methods on a task each. The third tells what each departure of `meds_recommended.yaml`
does to the published method on the second task (`study_departures.py`).

A sweep file can also be given to `meds sweep`; `run` then records what is finished. All runs of a task draw equally
many responses: one generation batch a step, of which a group filter trains on a part.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student_t
from study_departures import Observation, effects, half_of_combinations
from study_measures import measure, validations

from meds_megatron.config import Config, load_config
from meds_megatron.config.changes import is_free_to_change
from meds_megatron.errors import UserError
from meds_megatron.launch.sweep_config import SEED, SweepRun, expand, load_sweep
from meds_megatron.launch.sweep_runs import Executor, sweep
from meds_megatron.report.run_files import read_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE = CONFIGS / "quickstart.yaml"
TASKS = ("per_kind", "remainder")
"""Values of `data.arithmetic_rules`."""
HALF_AN_EPOCH = {"memory.half_life_steps": 2.5}
"""Of 120 problems, 24 a step."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("baselines/grpo.yaml", {}),
    "dapo": ("baselines/dapo.yaml", {}),
    "entropy": ("baselines/grpo_entropy.yaml", {}),
    "edas": ("baselines/edas.yaml", {}),
    "historical_counts": ("baselines/historical_counts.yaml", {}),
    "f_grpo": ("baselines/f_grpo.yaml", {}),
    "pass_at_k": ("baselines/pass_at_k.yaml", {}),
    "meds_published": ("quickstart.yaml", {}),
    "meds_answer": ("baselines/meds_answer.yaml", {}),
    "meds_recommended": ("meds_recommended.yaml", HALF_AN_EPOCH),
    "meds_recommended_answer": ("meds_recommended.yaml", HALF_AN_EPOCH | {"memory.method": "answer"}),
    # Also trains on groups without a right answer, whose penalties alone tell their responses apart.
    "meds_unsolved": (
        "meds_recommended.yaml",
        {"memory.half_life_steps": None, "filter.metric": "shaped", "advantage.std_floor": 0.4},
    ),
}
"""Config of each method, and what is changed in it."""
DEPARTURES: dict[str, dict[str, Any]] = {
    "noise": {"memory.noise": "ignore"},
    # Two of rare cases in one: each alone left the validation as it was to the last digit (tried.jsonl).
    "rare": {"memory.allow_single_cluster": True, "memory.no_answer": "own_cluster"},
    "filtered": {"memory.remember_filtered": True},
    "half_life": HALF_AN_EPOCH,
}
"""What `meds_recommended.yaml` has been tried with where the published method has something else."""
DEPARTURES_TASK, DEPARTURES_SEEDS = "remainder", 3
SWEEPS = (*TASKS, "departures")
MEASURES = (
    *("pass@1", "pass@n", "wrong_answers", "eigenvalue_ratio", "ari_fingerprint", "ari_answer"),
    *("saturated", "clusters", "minutes"),
)
CONTROL = "dapo"
"""Method that the others are compared with, run by run of the same seed."""
GAINS = {f"{measure} − {CONTROL}": measure for measure in ("pass@1", "pass@n")}
"""In what they are compared, by the name of the difference."""
FEWEST = 3
"""Differences of a method whose interval is drawn: that of two says nothing and hides the others."""
COLUMNS = (*MEASURES[:2], *GAINS, *MEASURES[2:])
"""Of the table."""
SHARED: dict[str, Any] = {
    "train.export_hf": False,
    "filter.max_batches": 1,
    "rollout.validation_responses": 32,
    "data.limit_validation": 96,
    "checkpoint.keep_last": 1,
    "wandb.enabled": False,
    # As cheap as may be without a change to what is learned: one process computes all layers.
    "cluster.ranks_per_node": 1,
    "parallel.pipeline": 1,
    "train.micro_batch_tokens": 8192,
    "train.forward_tokens": 16384,
    "checkpoint.every": 40,
    "sync.checksum_every": 0,
}
"""Settings of all runs."""
MEASURED_BY = {
    "train.steps",
    "data.validation",
    "data.limit_validation",
    "rollout.validation_temperature",
    "rollout.validation_top_p",
    "rollout.validation_responses",
}
"""Settings that a run may be resumed with and that change its measures."""
RECORDS = "runs.jsonl"
RUNS, STEPS, SEEDS = Path("runs/study"), 60, 5


def method_settings(method: str) -> dict[str, Any]:
    """The settings in which a method's config, on the study's base, differs from that base."""
    name, changed = METHODS[method]
    path = CONFIGS / name
    config = load_config(path, [] if path == BASE else [f"base={BASE}"])
    plain, own = dict(_leaves(asdict(load_config(BASE)))), dict(_leaves(asdict(config)))
    return {
        key: value for key, value in own.items() if value != plain[key] and key not in ("name", "run_dir")
    } | changed


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def write_plan(directory: Path, runs: Path, steps: int, more: list[str], **options: Any) -> None:
    """A sweep file for each of SWEEPS. `more` are `key=value` settings of all runs, the others as in `planned_sweep`."""
    settings: dict[str, Any] = {}
    for setting in more:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting}: expected key=value, a setting of all runs.")
        settings[key] = yaml.safe_load(value)
    directory.mkdir(parents=True, exist_ok=True)
    for name in SWEEPS:
        path = directory / f"{name}.yaml"
        sweep = planned_sweep(name, directory, runs, steps, settings, **options)
        _write(path, yaml.safe_dump(sweep, sort_keys=False))
        expand(load_sweep(path), path)  # Refuses what no run can use.


def planned_sweep(
    name: str,
    directory: Path,
    runs: Path = RUNS,
    steps: int = STEPS,
    more: dict[str, Any] | None = None,
    seeds: int = SEEDS,
    concurrent: int = 1,
    methods: Sequence[str] = tuple(METHODS),
) -> dict[str, Any]:
    """A sweep file of SWEEPS, which is to be in `directory`, with its runs in `runs` and the settings `more` for all.

    Of the departures each run has half, so that fewer seeds tell as much as all of them do of a method.
    """
    shared = SHARED | {"train.steps": steps, "train.validate_every": -(-steps // 2)} | (more or {})
    if name in TASKS:
        task, own = name, {method: method_settings(method) for method in methods}
    else:
        task, own = DEPARTURES_TASK, departure_settings()
        seeds = min(seeds, DEPARTURES_SEEDS)
    return {
        "name": f"study_{name}",
        "config": os.path.relpath(BASE, directory.resolve()),
        "directory": str(runs / name),
        "settings": shared | {"data.arithmetic_rules": task},
        "runs": own,
        "seeds": list(range(seeds)),
        "metrics": [f"validation/pass@{k}" for k in (1, shared["rollout.validation_responses"])],
        "concurrent": concurrent,
        "retries": 2,
        "job": {"nodes": 1, "gpus_per_node": 0, "exclusive": False},
    }


def departure_settings() -> dict[str, dict[str, Any]]:
    """The published method with half of all combinations of DEPARTURES: settings by the combination's name."""
    return {
        "+".join(chosen) or "none": {key: value for name in chosen for key, value in DEPARTURES[name].items()}
        for chosen in half_of_combinations(list(DEPARTURES))
    }


def run_missing(directory: Path, sweeps: list[str], methods: list[str] | None, executor: Executor) -> bool:
    """Trains what is planned (of `methods`, if given) and not recorded, and records each run as it ends. False if one
    failed."""
    fine = True
    for name in sweeps:
        path = directory / f"{name}.yaml"
        recorded = read_records(directory)
        runs = expand(load_sweep(path), path)
        known = {method_of(run) for run in runs}
        if unknown := set(methods or []) - known:
            raise UserError(f"{path} has no run {sorted(unknown)[0]}; expected some of {', '.join(sorted(known))}.")
        runs = [run for run in runs if method_of(run) in (methods or known)]
        missing = {run.name: run for run in runs if digest(run) not in recorded}

        def record_finished(_: Any = None, missing: dict[str, SweepRun] = missing) -> None:
            for run in [run for run in missing.values() if _is_finished(run)]:
                print(json.dumps(record(directory, missing.pop(run.name))), flush=True)

        record_finished()
        if missing:
            rows = sweep(path, executor, record_finished, only=set(missing))
            record_finished()
            fine &= all(row["state"] == "finished" for row in rows)
    return fine


def record(directory: Path, run: SweepRun) -> dict[str, Any]:
    """Adds a finished run to the records; its line."""
    files = read_run(run.directory)
    line = {
        "task": files.settings["data.arithmetic_rules"],
        "method": method_of(run),
        "seed": run.differences[SEED],
        "steps": run.steps,
        "settings": digest(run),
        "code": _commit(),
        "measures": {name: None if value is None else round(value, 5) for name, value in measure(files).items()},
        "validation": validations(files),
    }
    path = directory / RECORDS
    before = path.read_text() if path.exists() else ""
    _write(path, before + json.dumps(line) + "\n")
    return line


def _commit() -> str:
    """The present commit; with `-dirty` where files that decide a run differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", CONFIGS.parent, *arguments], capture_output=True, text=True)

    unchanged = git("diff", "--quiet", "HEAD", "--", "meds_megatron", "configs").returncode == 0
    return git("rev-parse", "HEAD").stdout.strip() + ("" if unchanged else "-dirty")


def read_records(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The recorded runs by the digest of their settings: several where machines have made different models.

    Runs of the same settings and start are one run, however often it was made.
    """
    path = directory / RECORDS
    records: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            run = {"seed": line["seed"], "start": line["validation"].get("0"), "measures": dict(line["measures"])}
            same = records[line["settings"]]
            if run["start"] not in [other["start"] for other in same]:
                same.append(run)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number}: expected a JSON object of a run; remove the line.") from error
    return records


def digest(run: SweepRun) -> str:
    """Hash of the settings that decide a run's measures, those with the schema's default value aside: a setting that is
    new and off changes nothing."""
    defaults = dict(_leaves(asdict(Config())))
    values = dict(_leaves(asdict(load_config(run.arguments[0], run.arguments[1:]))))
    deciding = {
        key: value
        for key, value in values.items()
        if value != defaults[key] and (key in MEASURED_BY or not is_free_to_change(key))
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def method_of(run: SweepRun) -> str:
    return run.name.rpartition(",")[0]


def collect_results(directory: Path) -> dict[str, Any]:
    """By task and method: the recorded runs, and mean and half-width of each measure's 95 % interval over them
    (Student's t; null with fewer than two), also of the differences from CONTROL's runs with the same seed and start.
    `departures` are the effects of DEPARTURES on each of GAINS' measures. `missing` are the planned runs that are not
    recorded, by sweep and method, how many."""
    records = read_records(directory)
    results: dict[str, Any] = {"tasks": {}, "departures": {}, "missing": {}}
    for name in SWEEPS:
        path = directory / f"{name}.yaml"
        methods: dict[str, list[dict[str, Any]]] = {}
        for run in expand(load_sweep(path), path):
            found = records.get(digest(run), [])
            methods.setdefault(method_of(run), []).extend(found)
            if not found:
                results["missing"].setdefault(name, Counter())[method_of(run)] += 1
        if name in TASKS:
            results["tasks"][name] = summaries_of(methods)
        else:
            results["departures"] = effects_of(methods)
    return results


def summaries_of(methods: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By method that has runs: these, the number of their pairs, and the means and intervals."""
    summaries = {}
    for name, runs in methods.items():
        pairs = pairs_of(runs, methods.get(CONTROL, []))
        if runs:
            summary = summary_of([run["measures"] for run in runs], pairs)
            summaries[name] = {"runs": runs, "pairs": len(pairs), "summary": summary}
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


def pairs_of(runs: list[dict[str, Any]], control: list[dict[str, Any]]) -> list[tuple[dict, dict]]:
    """Measures of the runs that have a counterpart in the control, and of that counterpart.

    Runs with the same seed and the same validation before the first step have model, data, order and first responses
    in common, so their differences vary less than the runs do. The model differs where another type of processor has
    made it.
    """
    return [
        (run["measures"], other["measures"])
        for run in runs
        for other in control
        if (run["seed"], run["start"]) == (other["seed"], other["start"])
    ]


def summary_of(measured: list[dict], pairs: list[tuple[dict, dict]]) -> dict[str, list[float | None]]:
    """Mean and interval of each measure of a method's runs, and of the differences within the pairs."""
    found = {name: mean_and_interval([one[name] for one in measured]) for name in (*MEASURES, "responses")}
    gains = {gain: mean_and_interval([one[of] - other[of] for one, other in pairs]) for gain, of in GAINS.items()}
    return found | gains


def _is_finished(run: SweepRun) -> bool:
    if not (run.directory / "metrics.jsonl").is_file():
        return False
    last = read_run(run.directory).metrics[-1:]
    return bool(last) and last[0]["step"] == run.steps and "validation/pass@1" in last[0]


def mean_and_interval(measured: list[float | None]) -> list[float | None]:
    """Mean of the values that are not null, and half-width of its 95 % interval."""
    values = [value for value in measured if value is not None]
    if not values:
        return [None, None]
    mean = float(np.mean(values))
    if len(values) < 2:
        return [mean, None]
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return [mean, error * float(student_t.ppf(0.975, len(values) - 1))]


def table_of(results: dict[str, Any]) -> str:
    """The results as Markdown, a table for each task."""
    lines = []
    for task, methods in results["tasks"].items():
        lines += [f"### {task}", ""]
        if methods:
            lines += ["| method | runs | " + " | ".join(COLUMNS) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
        for name, method in methods.items():
            cells = [_cell(*method["summary"][column]) for column in COLUMNS]
            lines.append(f"| {name} | {len(method['runs'])} | " + " | ".join(cells) + " |")
        lines += [""] if methods else []
        lines += _missing_of(results, task)
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


def draw(results: dict[str, Any], path: Path) -> None:
    """Differences from CONTROL's runs in pass@1 and pass@n, a panel for each task that was run; their intervals for
    methods with FEWEST differences or more."""
    from matplotlib.figure import Figure

    drawn = {task: methods for task, methods in results["tasks"].items() if methods}
    figure = Figure(figsize=(7 * max(len(drawn), 1), 5), layout="constrained")
    panels = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    across, up = GAINS
    for panel, (task, methods) in zip(panels, drawn.items(), strict=False):
        panel.axhline(0, color="0.8", zorder=0)
        panel.axvline(0, color="0.8", zorder=0)
        for name, method in methods.items():
            (x, x_interval), (y, y_interval) = (method["summary"][gain] for gain in GAINS)
            count = method["pairs"]
            if name == CONTROL or x is None:
                continue
            errors = {"xerr": x_interval, "yerr": y_interval} if count >= FEWEST else {}
            panel.errorbar(x, y, **errors, fmt="o", capsize=2, label=f"{name} ({count})")
        panel.set(title=task, xlabel=across, ylabel=up)
        panel.locator_params(axis="x", nbins=5)
        if panel.containers:
            panel.legend(fontsize=8, title="method (pairs)", loc="center left", bbox_to_anchor=(1.0, 0.5))
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    directory = given.directory
    try:
        if given.command == "plan":
            options = {name: getattr(given, name) for name in ("seeds", "concurrent", "methods")}
            write_plan(directory, given.runs, given.steps, given.set, **options)
        elif given.command == "run":
            return int(not run_missing(directory, given.sweeps, given.methods, given.executor))
        else:
            found = collect_results(directory)
            _write(directory / "results.md", table_of(found))
            draw(found, directory / "results.png")
            print(table_of(found))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan, run, results = (commands.add_parser(name) for name in ("plan", "run", "results"))
    for command in (plan, run, results):
        command.add_argument("directory", type=Path)
    plan.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    run.add_argument("--methods", nargs="+", help="some of the sweep file's runs; default: all")
    plan.add_argument("--runs", type=Path, default=RUNS, help="directory of the runs")
    plan.add_argument("--steps", type=int, default=STEPS)
    plan.add_argument("--seeds", type=int, default=SEEDS)
    plan.add_argument("--concurrent", type=int, default=1, help="runs at a time")
    plan.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    run.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    run.add_argument("--executor", choices=["auto", "local", "slurm"], default="local")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
