"""The files in slurm/: Slurm accepts them, and what they run is a config that fits the job's nodes."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meds_megatron.cluster.slurm.node import job_settings
from meds_megatron.config import Config, load_config
from meds_megatron.config.validate import validate
from meds_megatron.errors import UserError
from meds_megatron.plan.plan import make_plan
from tests.slurm.cluster import ROOT, Cluster, obstacle

pytestmark = pytest.mark.usefixtures("processes")

FILES = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.fixture(scope="module")
def eight_nodes(tmp_path_factory) -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(f"no Slurm of eight nodes can be made here: {reason}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm8"), shared=tmp_path_factory.getbasetemp(), nodes=8)
    yield cluster
    cluster.close()


def resolved(file: Path, directory: Path, nodes: int, *overrides: str) -> Config:
    """The config of the run that a batch script starts on `nodes` nodes."""
    shim = directory / ".venv" / "bin" / "python"
    shim.parent.mkdir(parents=True, exist_ok=True)
    shim.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    shim.chmod(0o755)
    environment = {"SLURM_JOB_NAME": "mine", "PATH": "/usr/bin:/bin"}
    script = ["bash", str(file), *overrides]
    done = subprocess.run(script, cwd=directory, env=environment, capture_output=True, text=True, check=True)
    option, module, config, *settings = done.stdout.splitlines()
    assert (option, module) == ("-m", "meds_megatron.cluster.slurm.job")
    settings += job_settings(load_config(ROOT / config, settings), nodes, settings)
    return load_config(ROOT / config, settings)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_slurm_accepts_every_file(eight_nodes, file):
    tried = subprocess.run(
        ["sbatch", "--test-only", file], env=eight_nodes.environment, cwd=ROOT, capture_output=True, text=True
    )
    assert tried.returncode == 0 and "to start at" in tried.stderr, tried.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("times", [1, 2])
def test_what_a_file_runs_is_a_valid_config(file, times, tmp_path):
    nodes = times * int(re.search(r"^#SBATCH --nodes=(\d+)$", file.read_text(), re.MULTILINE)[1])
    config = resolved(file, tmp_path, nodes, "train.seed=7")
    validate(config)
    assert make_plan(config).refusal is None
    assert (config.name, config.run_dir, config.train.seed) == ("mine", "runs/mine", 7)
    assert config.cluster.nodes == nodes
    if file.stem != "meds_cpu":
        assert config.cluster.device == "cuda" and config.cluster.ranks_per_node == 8
        assert config.rollout.engines * config.rollout.tensor == 8 * nodes


def test_engines_on_nodes_of_their_own_leave_the_others_to_the_trainer(tmp_path):
    (file,) = (file for file in FILES if file.stem == "meds_qwen3_8b")
    config = resolved(file, tmp_path, 6, "rollout.nodes=2", "rollout.engines=16")
    assert (config.cluster.nodes, config.rollout.nodes, config.rollout.engines) == (4, 2, 16)
    with pytest.raises(UserError, match=r"rollout\.nodes = 2, but the job has 2 nodes"):
        resolved(file, tmp_path, 2, "rollout.nodes=2")
