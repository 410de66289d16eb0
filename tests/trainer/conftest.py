import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def published_run(small_model, tmp_path_factory, cpu_engines) -> Path:
    """The directory of a finished run of 3 steps over the same 6 problems in each, on PP2 x DP2.

    Entropy-shaped advantages and weight decay, which are no part of the quickstart, are on, so that the replay sees
    them.
    """
    settings = {
        "cluster.ranks_per_node": 4,
        "data.limit_train": 6,
        "data.limit_validation": 4,
        "filter.metric": "none",
        "train.prompts_per_step": 6,
        "train.mini_batch_prompts": 3,
        "train.validate_every": 3,
        "train.export_every": 2,
        "optimizer.lr": 1e-4,
        "optimizer.weight_decay": 0.1,
        "advantage.entropy_coefficient": 0.4,
    }
    return finished_run("quickstart", small_model, tmp_path_factory.mktemp("run") / "published", settings)


@pytest.fixture(scope="session")
def departures_run(small_model, tmp_path_factory, cpu_engines) -> Path:
    """The directory of a finished run of 3 steps over the same 4 problems again and again, on DP2: the recommended
    setting and the other departures, so that it also remembers and trains on groups without a right answer."""
    settings = {
        "base": "configs/quickstart.yaml",
        "parallel.pipeline": 1,
        "data.limit_train": 4,
        "rollout.max_response_tokens": 18,  # some answers are cut off before their box
        "memory.remember_filtered": "true",
        "memory.half_life_steps": 2.5,
        "filter.metric": "shaped",
        "filter.max_batches": 3,
        "advantage.std_floor": 0.4,
        "train.prompts_per_step": 4,
        "train.mini_batch_prompts": 2,
        "train.validate_every": 0,
        "train.export_hf": "false",
    }
    return finished_run("meds_recommended", small_model, tmp_path_factory.mktemp("run") / "recommended", settings)


def finished_run(config: str, model: Path, directory: Path, settings: dict) -> Path:
    common = {
        "run_dir": directory,
        "model.make": "no",
        "model.path": model,
        "cluster.device": "cpu",
        "rollout.responses_per_prompt": 8,
        "train.steps": 3,
        "train.micro_batch_tokens": 256,
    }
    command = [sys.executable, "-m", "meds_megatron.cli", "train", f"configs/{config}.yaml"]
    command += [f"{key}={value}" for key, value in (common | settings).items()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return directory
