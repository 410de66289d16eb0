"""`meds` as a user starts it: commands in processes of their own, and whole runs of a small model."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.limits import HANG_SECONDS

SMALL = {
    "model.make": "no",
    "cluster.device": "cpu",
    "wandb.enabled": "false",
    "rollout.responses_per_prompt": 8,
    "train.micro_batch_tokens": 256,
}
"""Settings of every whole run of the small model, unless it has others."""
PUBLISHED_RUN = {
    "cluster.ranks_per_node": 4,
    "data.limit_train": 6,
    "data.limit_validation": 4,
    "filter.metric": "none",
    "train.steps": 3,
    "train.prompts_per_step": 6,
    "train.mini_batch_prompts": 3,
    "train.validate_every": 3,
    "train.export_every": 2,
    "checkpoint.every": 2,
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 0.1,
    "advantage.entropy_coefficient": 0.4,
    "wandb.enabled": "true",
}
"""Entropy-shaped advantages and weight decay, which are no part of the quickstart, are on, so that the replay sees
them."""
DEPARTURES_RUN = {
    "base": "configs/quickstart.yaml",
    "parallel.pipeline": 1,
    "data.limit_train": 4,
    "rollout.max_response_tokens": 18,  # some answers are cut off before their box
    "memory.remember_filtered": "true",
    "memory.half_life_steps": 2.5,
    "filter.metric": "shaped",
    "filter.max_batches": 3,
    "advantage.std_floor": 0.4,
    "train.steps": 3,
    "train.prompts_per_step": 4,
    "train.mini_batch_prompts": 2,
    "train.validate_every": 0,
    "train.export_hf": "false",
}


def meds(*arguments: object) -> subprocess.CompletedProcess:
    return run_module("meds_megatron.cli", *arguments)


def run_module(module: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)


def overrides(directory: Path, model: Path, settings: dict[str, Any]) -> list[str]:
    settings = SMALL | {"run_dir": directory, "model.path": model} | settings
    return [f"{key}={value}" for key, value in settings.items()]


def train(directory: Path, model: Path, settings: dict, config: str = "quickstart") -> subprocess.CompletedProcess:
    return meds("train", f"configs/{config}.yaml", *overrides(directory, model, settings))


def finished_run(directory: Path, model: Path, settings: dict, config: str = "quickstart") -> Path:
    check(train(directory, model, settings, config))
    return directory


def check(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def metrics_of(run_dir: Path) -> list[dict]:
    """A dict a step; the first is step 0, the validation before training, if there was one."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
