"""The study's runs: methods, tasks and settings, as sweep files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_departures import half_of_combinations

from meds_megatron.config import load_config
from meds_megatron.config.changes import settings_of
from meds_megatron.errors import UserError
from meds_megatron.sweeps.config import SweepRun, expand, load_sweep

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE = CONFIGS / "quickstart.yaml"
TASKS = ("per_kind", "remainder")
"""Values of `data.arithmetic_rules`."""
METHODS = {
    "grpo": "baselines/grpo.yaml",
    "dapo": "baselines/dapo.yaml",
    "entropy": "baselines/grpo_entropy.yaml",
    "edas": "baselines/edas.yaml",
    "historical_counts": "baselines/historical_counts.yaml",
    "f_grpo": "baselines/f_grpo.yaml",
    "meds_published": "quickstart.yaml",
    "meds_answer": "baselines/meds_answer.yaml",
    "meds_recommended": "meds_recommended.yaml",
}
"""Config of each method."""
DEPARTURES: dict[str, dict[str, Any]] = {
    "noise": {"memory.noise": "ignore"},
    # Two of rare cases in one: with noise ignored or a half-life, one of them gives the same validation as both.
    "rare": {"memory.allow_single_cluster": True, "memory.no_answer": "own_cluster"},
    "filtered": {"memory.remember_filtered": True},
    # Half an epoch: 120 problems, 24 a step.
    "half_life": {"memory.half_life_steps": 2.5},
}
"""Departures from the published method that could help; `meds_recommended.yaml` has some of them."""
DEPARTURES_TASK, DEPARTURES_SEEDS = "remainder", 3
CONFIRMED = ("dapo", "meds_published", "meds_recommended")
"""Methods whose difference in pass@n on the second task is measured once more: with seeds on which nothing was chosen,
on all its validation problems, and with four times the responses, so that chance in the validation counts less."""
CONFIRMATION_TASK = "remainder"
CONFIRMATION_SETTINGS = {"data.limit_validation": 112, "rollout.validation_responses": 128}
COMPARISONS = (*TASKS, "confirmation")
"""Sweeps that compare methods."""
SWEEPS = (*COMPARISONS, "departures")
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
"""Settings of all runs, but for CONFIRMATION_SETTINGS."""
RUNS, STEPS, SEEDS = Path("runs/study"), 60, 5
LARGEST_N = 32


def measured_n(responses: int) -> int:
    """n of the measured pass@n, with as many responses to each validation problem."""
    return min(LARGEST_N, responses)


def method_settings(method: str) -> dict[str, Any]:
    """The settings in which a method's config, on the study's base, differs from that base."""
    path = CONFIGS / METHODS[method]
    config = load_config(path, [] if path == BASE else [f"base={BASE}"])
    plain, own = settings_of(load_config(BASE)), settings_of(config)
    return {key: value for key, value in own.items() if value != plain[key] and key not in ("name", "run_dir")}


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

    The tasks' sweeps have the first `seeds` seeds and `methods`; the confirmation has as many seeds that they have
    not. Each run of the departures has half of them, and each effect is of all runs: DEPARTURES_SEEDS are enough.
    """
    shared = SHARED | {"train.steps": steps, "train.validate_every": -(-steps // 2)}
    first = 0
    if name in TASKS:
        task, own = name, {method: method_settings(method) for method in methods}
    elif name == "confirmation":
        task, own = CONFIRMATION_TASK, {method: method_settings(method) for method in CONFIRMED}
        shared |= CONFIRMATION_SETTINGS | {"train.validate_every": steps}
        first = max(SEEDS, seeds)
    else:
        task, own = DEPARTURES_TASK, departure_settings()
        seeds = min(seeds, DEPARTURES_SEEDS)
    shared |= more or {}
    return {
        "name": f"study_{name}",
        "config": os.path.relpath(BASE, directory.resolve()),
        "directory": str(runs / name),
        "settings": shared | {"data.arithmetic_rules": task},
        "runs": own,
        "seeds": list(range(first, first + seeds)),
        "metrics": [f"validation/pass@{k}" for k in (1, measured_n(shared["rollout.validation_responses"]))],
        "concurrent": concurrent,
        "retries": 2,
        "job": {"nodes": 1, "gpus_per_node": 0, "exclusive": False},
    }


def planned_runs(directory: Path, name: str) -> tuple[Path, list[SweepRun]]:
    """A sweep's file in the study's directory, and its runs. Raises UserError where it is not there."""
    path = directory / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"{path}: this sweep is not planned; run `python tools/study/study.py plan {directory}` first.")
    return path, expand(load_sweep(path), path)


def departure_settings() -> dict[str, dict[str, Any]]:
    """The published method with half of all combinations of DEPARTURES: settings by the combination's name."""
    return {
        "+".join(chosen) or "none": {key: value for name in chosen for key, value in DEPARTURES[name].items()}
        for chosen in half_of_combinations(list(DEPARTURES))
    }
