"""Wall time of a run whose engines generate while the trainer computes, against one in which they take turns."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from meds_megatron.errors import UserError
from meds_megatron.run.reader import read_run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
SHARED = {
    # One core for the trainer, one for the engine.
    "cluster.ranks_per_node": 1,
    "parallel.pipeline": 1,
    "rollout.deterministic": False,
    "train.export_hf": False,
    "checkpoint.every": 0,
    "wandb.enabled": False,
}
"""Settings of both runs that differ from the quickstart's."""


def run(steps: int, seeds: int, max_staleness: int, overrides: list[str], directory: str | None = None) -> dict:
    """Trains the quickstart for `steps` with one trainer rank and one engine, at staleness 0 and at `max_staleness`,
    one after the other, for each of `seeds`; `overrides` are further `key=value` settings of both. The run directories
    are kept in `directory`, if it is given.

    Keys: `ratio`, mean over the seeds of the overlapping run's time to the other's, from the first step to the last
    without validation; `seconds` and `accuracy` (held out, after the last step) of each by seed, `accuracy_difference`
    of their means; `waiting`, the share of its time that each trainer waited for responses; `staleness`, mean age of
    the tokens trained on; and `steps`, `max_staleness`, `settings`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(directory or temporary)
        found: dict[str, list[dict[str, float]]] = {"sync": [], "overlap": []}
        for seed in range(seeds):
            for name, staleness in (("sync", 0), ("overlap", max_staleness)):
                settings = SHARED | {"train.steps": steps, "train.seed": seed, "train.max_staleness": staleness}
                # Only the last step's validation is used.
                settings["train.validate_every"] = steps
                found[name].append(_measure(place / f"{name}{seed}", settings, overrides))
    columns = {name: _columns(runs) for name, runs in found.items()}
    pairs = zip(columns["overlap"]["seconds"], columns["sync"]["seconds"], strict=True)
    accuracies = {name: mean(column["accuracy"]) for name, column in columns.items()}
    return {
        "ratio": mean(overlap / sync for overlap, sync in pairs),
        "accuracy_difference": accuracies["overlap"] - accuracies["sync"],
        **{key: {name: column[key] for name, column in columns.items()} for key in ("seconds", "accuracy", "waiting")},
        "staleness": mean(columns["overlap"]["staleness"]),
        "steps": steps,
        "max_staleness": max_staleness,
        "settings": overrides,
    }


def _measure(run_dir: Path, settings: dict[str, Any], overrides: list[str]) -> dict[str, float]:
    """Trains once; its time, accuracy, and shares. Raises UserError, with the end of its output, when it fails."""
    command = [sys.executable, "-m", "meds_megatron.cli", "train", str(CONFIG), f"run_dir={run_dir}"]
    command += [f"{key}={json.dumps(value)}" for key, value in settings.items()] + overrides
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"{' '.join(command)} ended with {finished.returncode}: {finished.stderr[-1000:]}")
    steps = [line for line in read_run(run_dir).metrics if line["step"] > 0]
    seconds = sum(line["time/step"] - line.get("time/validation", 0.0) for line in steps)
    waiting = sum(line["time/rollout"] + line["time/reward"] for line in steps)
    return {
        "seconds": seconds,
        "accuracy": steps[-1]["validation/accuracy"],
        "waiting": waiting / seconds,
        "staleness": mean(line.get("staleness/mean", 0.0) for line in steps),
    }


def _columns(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [measures[name] for measures in runs] for name in runs[0]}
