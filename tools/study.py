"""Study of MEDS and its rivals on the two embedded tasks: runs, measures, a table and a picture.

    python tools/study.py plan DIR            # writes DIR/per_kind.yaml and DIR/remainder.yaml, sweep files
    python tools/study.py run DIR             # trains what is not finished, here or as Slurm jobs (--executor slurm)
    python tools/study.py results DIR         # writes DIR/results.json, DIR/results.md and DIR/results.png

A sweep file can also be given to `meds sweep`. All runs of a task draw equally many responses: one generation batch a
step, of which a group filter trains on a part. A study that was interrupted goes on where it stopped, and `results`
takes what is finished.

Measures of a run, with wrong responses those that were graded and are not right:

- `pass@1`, `pass@n`: of the validation after the last step, with n responses to a problem.
- `wrong_answers`: different wrong final answers in a prompt's group, mean over the groups of the last quarter of steps.
- `eigenvalue_ratio`: largest eigenvalue of the covariance of the wrong responses' fingerprints over the sum of all, in
  the last quarter of steps.
- `ari_fingerprint`, `ari_answer`: adjusted Rand index between the habits that the workings show and the clusters of
  fingerprints (of the run's memory settings), or the final answers; mean over problems weighted by their responses.
- `minutes`, `responses`: time of all steps without validation, and responses drawn.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t as student_t
from sklearn.metrics import adjusted_rand_score

from meds_megatron.config import Config, MemoryConfig, load_config
from meds_megatron.embedded.arithmetic import habit_of
from meds_megatron.errors import UserError
from meds_megatron.latex import last_boxed
from meds_megatron.launch.sweep_config import SEED, SweepRun, expand, load_sweep
from meds_megatron.launch.sweep_runs import sweep_with_live_table
from meds_megatron.memory import MemoryShard
from meds_megatron.memory.statistics import Moments, top_eigenvalue_share
from meds_megatron.report.run_files import RunFiles, read_columns, read_run, texts_of, vectors_of
from meds_megatron.reward.answers import answer_class

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE = CONFIGS / "quickstart.yaml"
TASKS = ("per_kind", "remainder")
"""Values of `data.arithmetic_rules`."""
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
    "meds_recommended": ("meds_recommended.yaml", {}),
    "meds_recommended_answer": ("meds_recommended.yaml", {"memory.method": "answer"}),
}
"""Config of each method, and what is changed in it."""
MEASURES = ("pass@1", "pass@n", "wrong_answers", "eigenvalue_ratio", "ari_fingerprint", "ari_answer", "minutes")
"""Columns of the table."""


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


def write_plan(directory: Path, steps: int, seeds: int, concurrent: int, methods: list[str], more: list[str]) -> None:
    """A sweep file for each task. `more` are `key=value` settings of all runs."""
    shared = {
        "train.steps": steps,
        "train.validate_every": steps,
        "train.export_hf": False,
        "filter.max_batches": 1,
        "rollout.validation_responses": 32,
        "checkpoint.keep_last": 1,
        "wandb.enabled": False,
    }
    for setting in more:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting}: expected key=value, a setting of all runs.")
        shared[key] = yaml.safe_load(value)
    directory.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        path = directory / f"{task}.yaml"
        sweep = {
            "name": f"study_{task}",
            "config": str(BASE),
            "directory": str(directory.absolute() / task),
            "settings": shared | {"data.arithmetic_rules": task},
            "runs": {method: method_settings(method) for method in methods},
            "seeds": list(range(seeds)),
            "metrics": [f"validation/pass@{k}" for k in (1, shared["rollout.validation_responses"])],
            "concurrent": concurrent,
            "retries": 2,
            "job": {"nodes": 1, "gpus_per_node": 0, "exclusive": False},
        }
        _write(path, yaml.safe_dump(sweep, sort_keys=False))
        expand(load_sweep(path), path)  # Refuses what no run can use.


def measure(files: RunFiles) -> dict[str, float | None]:
    """The measures of a finished run; null for one that no response counts in."""
    last, config = files.metrics[-1], files.config
    trained = [line for line in files.metrics if line["step"] > 0]
    seconds = sum(line["time/step"] - line.get("time/validation", 0.0) for line in trained)
    measures = {
        "pass@1": last["validation/pass@1"],
        "pass@n": last[f"validation/pass@{config.rollout.validation_responses}"],
        "minutes": seconds / 60,
        "responses": sum(line["response/count"] for line in trained),
    }
    first_late = 3 * len(files.rollouts) // 4
    late, agreement = WrongResponses(), WrongResponses()
    for number, path in enumerate(files.rollouts):
        table = read_columns(path, ["key", "group", "prompt", "response", "correct", "outcome", "fingerprint"])
        agreement.add(table, number)
        if number >= first_late:
            late.add(table, number)
    return measures | late.diversity() | agreement.agreement(config)


class WrongResponses:
    """The wrong responses of some steps."""

    def __init__(self) -> None:
        self._group_answers: dict[tuple[int, int], set[str]] = {}
        self._by_key: dict[str, list[tuple[str, str, np.ndarray]]] = defaultdict(list)
        """Habit, final answer and fingerprint by memory key, of responses that have all three."""

    def add(self, table: Any, step: int) -> None:
        """The responses of a step's rollout file."""
        names = ("key", "prompt", "response", "outcome")
        texts = zip(*(texts_of(table[name]) for name in names), strict=True)
        numbers = zip(table["group"].to_pylist(), table["correct"].to_pylist(), strict=True)
        rows = zip(texts, numbers, vectors_of(table["fingerprint"]), strict=True)
        for (key, prompt, response, outcome), (group, correct), fingerprint_L in rows:
            answers = self._group_answers.setdefault((step, group), set())
            if correct or outcome in ("timeout", "error"):
                continue
            answer = answer_class(last_boxed(response) or "")
            answers.add(answer)
            habit = habit_of(prompt, response)
            if habit is not None and np.isfinite(fingerprint_L).all() and len(fingerprint_L):
                self._by_key[key].append((str(habit), answer, fingerprint_L))

    def diversity(self) -> dict[str, float | None]:
        """`wrong_answers` and `eigenvalue_ratio`."""
        counts = [len(answers) for answers in self._group_answers.values()]
        vectors = [fingerprint_L for rows in self._by_key.values() for *_, fingerprint_L in rows]
        ratio = None
        if vectors:
            ratio = top_eigenvalue_share(*Moments.of_none(len(vectors[0])).plus(np.stack(vectors)))
        return {"wrong_answers": float(np.mean(counts)), "eigenvalue_ratio": ratio}

    def agreement(self, config: Config) -> dict[str, float | None]:
        """`ari_fingerprint` and `ari_answer`, over the problems with two such responses or more."""
        memory = replace(config.memory, method="hdbscan", window=None, budget_gib=None)
        weights, by_fingerprint, by_answer = [], [], []
        for rows in self._by_key.values():
            if len(rows) < 2:
                continue
            habits, answers, fingerprints = zip(*rows, strict=True)
            weights.append(len(rows))
            by_fingerprint.append(adjusted_rand_score(habits, clusters_of(np.stack(fingerprints), memory)))
            by_answer.append(adjusted_rand_score(habits, answers))
        if not weights:
            return {"ari_fingerprint": None, "ari_answer": None}
        return {
            "ari_fingerprint": float(np.average(by_fingerprint, weights=weights)),
            "ari_answer": float(np.average(by_answer, weights=weights)),
        }


def clusters_of(fingerprints_NL: np.ndarray, config: MemoryConfig) -> list[int]:
    """Labels that the memory gives a problem's fingerprints; each noise vector is alone with `noise: ignore`."""
    shard = MemoryShard(config)
    shard.remember([""] * len(fingerprints_NL), fingerprints_NL)
    shard.recluster()
    labels = shard.labels("").tolist()
    if config.noise == "cluster":
        return labels
    return [label if label >= 0 else -1 - place for place, label in enumerate(labels)]


def collect_results(directory: Path) -> dict[str, Any]:
    """By task and method: the measures of every finished run by seed, and mean and half-width of each measure's 95 %
    interval over the seeds (Student's t; null with fewer than two). `unfinished` are the runs that are not."""
    results: dict[str, Any] = {"tasks": {}, "unfinished": []}
    for task in TASKS:
        path = directory / f"{task}.yaml"
        methods: dict[str, dict] = {}
        for run in expand(load_sweep(path), path):
            if not _is_finished(run):
                results["unfinished"].append(f"{task}/{run.name}")
                continue
            runs = methods.setdefault(run.name.rpartition(",")[0], {"runs": {}})["runs"]
            runs[str(run.differences[SEED])] = measure(read_run(run.directory))
        for method in methods.values():
            by_measure = {name: [run[name] for run in method["runs"].values()] for name in (*MEASURES, "responses")}
            method["summary"] = {name: mean_and_interval(values) for name, values in by_measure.items()}
        results["tasks"][task] = methods
    return results


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
        lines += [
            f"### {task}",
            "",
            "| method | seeds | " + " | ".join(MEASURES) + " |",
            "|---" * (2 + len(MEASURES)) + "|",
        ]
        for name, method in methods.items():
            cells = [_cell(*method["summary"][measure]) for measure in MEASURES]
            lines.append(f"| {name} | {len(method['runs'])} | " + " | ".join(cells) + " |")
        lines.append("")
    if results["unfinished"]:
        lines += [f"Not finished: {len(results['unfinished'])} runs.", ""]
    return "\n".join(lines)


def _cell(mean: float | None, interval: float | None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.3f}" if interval is None else f"{mean:.3f} ± {interval:.3f}"


def draw(results: dict[str, Any], path: Path) -> None:
    """pass@1 against pass@n of every method with their intervals, a panel for each task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results["tasks"]), 5), layout="constrained")
    panels = figure.subplots(1, len(results["tasks"]), squeeze=False)[0]
    for panel, (task, methods) in zip(panels, results["tasks"].items(), strict=True):
        for name, method in methods.items():
            (x, x_interval), (y, y_interval) = (method["summary"][measure] for measure in ("pass@1", "pass@n"))
            panel.errorbar(x, y, xerr=x_interval, yerr=y_interval, fmt="o", capsize=2)
            panel.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        panel.set(title=task, xlabel="pass@1", ylabel="pass@n")
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png", dpi=120)
    os.replace(unfinished, path)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan, run, results = (commands.add_parser(name) for name in ("plan", "run", "results"))
    for command in (plan, run, results):
        command.add_argument("directory", type=Path)
    plan.add_argument("--steps", type=int, default=120)
    plan.add_argument("--seeds", type=int, default=5)
    plan.add_argument("--concurrent", type=int, default=1, help="runs at a time")
    plan.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    plan.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    run.add_argument("--executor", choices=["auto", "local", "slurm"], default="local")
    given = parser.parse_args(arguments)
    try:
        if given.command == "plan":
            write_plan(given.directory, given.steps, given.seeds, given.concurrent, given.methods, given.set)
        elif given.command == "run":
            rows = [
                row for task in TASKS for row in sweep_with_live_table(given.directory / f"{task}.yaml", given.executor)
            ]
            return int(any(row["state"] == "failed" for row in rows))
        else:
            found = collect_results(given.directory)
            _write(given.directory / "results.json", json.dumps(found, indent=1))
            _write(given.directory / "results.md", table_of(found))
            draw(found, given.directory / "results.png")
            print(table_of(found))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
