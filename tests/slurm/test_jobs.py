"""Jobs of a real Slurm: a run over two nodes, next to another one; saved, killed, requeued and resumed; cancelled."""

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from meds_megatron.sweeps import sweep
from tests.limits import HANG_SECONDS
from tests.slurm.cluster import ROOT, Cluster

STEPS = 6
VARYING = ("time/", "throughput/", "memory/lookup_seconds", "memory/recluster_seconds")
"""Metrics that measure the machine."""


def submit(slurm: Cluster, model: Path, name: str, *options: str, **settings) -> str:
    """Submits slurm/meds_cpu.sbatch; the job's id. Log and run directory are in the cluster's directory."""
    settings = {
        "model.make": "no",
        "model.path": model,
        "data.limit_train": 6,
        "data.limit_validation": 4,
        "rollout.responses_per_prompt": 8,
        "filter.metric": "none",
        "train.steps": STEPS,
        "train.prompts_per_step": 4,
        "train.mini_batch_prompts": 4,
        "train.micro_batch_tokens": 512,
        "train.validate_every": 0,
        "train.export_hf": "false",
        "checkpoint.every": 1,
        "wandb.enabled": "false",
        "run_dir": run_directory(slurm, name),
        **settings,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    place = [f"--job-name={name}", f"--output={slurm.directory / name}.log"]
    return slurm.run("sbatch", "--parsable", *place, *options, "slurm/meds_cpu.sbatch", *overrides)


def run_directory(slurm: Cluster, name: str) -> Path:
    return slurm.directory / "runs" / name


def metrics(slurm: Cluster, name: str) -> list[dict]:
    file = run_directory(slurm, name) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in line.items() if not key.startswith(VARYING)} for line in lines]


def wait_for_steps(slurm: Cluster, name: str, job: str, steps: int) -> None:
    """Returns when the run has finished `steps` steps."""

    def reached() -> bool:
        if len(metrics(slurm, name)) >= steps:
            return True
        assert slurm.state(job) in ("PENDING", "RUNNING", "COMPLETING"), log(slurm, name)
        return False

    slurm.wait(reached, HANG_SECONDS)


def log(slurm: Cluster, name: str) -> str:
    return (slurm.directory / f"{name}.log").read_text()


def assert_nothing_is_left(slurm: Cluster) -> None:
    for node in slurm.names:
        assert slurm.processes(node) == []
        assert slurm.on_node(node, "ls", "/dev/shm").stdout.split() == []
        assert not [name for name in slurm.on_node(node, "ls", "/tmp").stdout.split() if name.startswith("meds-")]


@pytest.fixture(scope="module")
def two_jobs(slurm, small_model, cpu_engines) -> dict[str, str]:
    """Two jobs at once: one over both nodes, and one on a node that the first is also on. Their ids by name."""
    jobs = {
        "two_nodes": submit(slurm, small_model, "two_nodes"),
        "one_node": submit(slurm, small_model, "one_node", "--nodes=1", **{"cluster.ranks_per_node": 2}),
    }
    slurm.wait(lambda: [slurm.state(job) for job in jobs.values()] == ["RUNNING", "RUNNING"], HANG_SECONDS)
    for name, job in jobs.items():
        wait_for_steps(slurm, name, job, 1)
    return jobs


def test_two_jobs_at_once_train_over_two_nodes_as_on_one(slurm, two_jobs):
    """With a pipeline stage on each node, to the last bit."""
    for name, job in two_jobs.items():
        assert (slurm.finish(job, HANG_SECONDS), slurm.exit_code(job)) == ("COMPLETED", "0:0"), log(slurm, name)
    ours, theirs = metrics(slurm, "two_nodes"), metrics(slurm, "one_node")
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    assert ours == theirs
    config = (run_directory(slurm, "two_nodes") / "config.yaml").read_text()
    assert "nodes: 2\n" in config and "ranks_per_node: 1\n" in config
    assert_nothing_is_left(slurm)


def test_a_job_that_is_told_to_save_and_then_loses_a_node_resumes_by_itself(slurm, small_model, two_jobs):
    job = submit(slurm, small_model, "resumed")
    wait_for_steps(slurm, "resumed", job, 1)
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait(lambda: slurm.state(job) == "PENDING", HANG_SECONDS)
    saved = len(metrics(slurm, "resumed"))
    wait_for_steps(slurm, "resumed", job, saved + 1)
    slurm.kill("node1")
    slurm.wait(lambda: slurm.state(job) == "PENDING", HANG_SECONDS)
    slurm.boot("node1")
    assert (slurm.finish(job, HANG_SECONDS), slurm.exit_code(job)) == ("COMPLETED", "0:0"), log(slurm, "resumed")
    assert metrics(slurm, "resumed") == metrics(slurm, "two_nodes")
    assert_nothing_is_left(slurm)


def test_strangers_stay_out_and_a_cancelled_job_leaves_nothing(slurm, small_model, cpu_engines):
    job = submit(slurm, small_model, "cancelled", **{"train.steps": 1000})
    wait_for_steps(slurm, "cancelled", job, 1)
    address = OmegaConf.load(run_directory(slurm, "cancelled") / "config.yaml").cluster.address
    (token,) = slurm.on_node("node1", "sh", "-c", "cat /tmp/meds-*/token").stdout.split()
    connect = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={address}"]
    for variables, welcome in (
        (["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={token}"], True),
        (["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN={'0' * 64}"], False),
        (["RAY_AUTH_MODE=disabled"], False),
    ):
        connected = slurm.on_node("node1", "env", *variables, *connect, timeout=HANG_SECONDS)
        assert (connected.returncode == 0) == welcome, connected.stderr
        assert welcome or "AuthenticationError" in connected.stderr
    slurm.run("scancel", job)
    assert slurm.finish(job, HANG_SECONDS) == "CANCELLED"
    slurm.wait(lambda: slurm.idle() == slurm.names, HANG_SECONDS)
    assert_nothing_is_left(slurm)


def test_a_sweep_submits_its_runs_and_takes_their_exit_codes(slurm, tmp_path, monkeypatch):
    """Sweep of runs whose model is not there, so that they end soon. Whole ones: `python -m tests.slurm.long_sweep`."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    file = tmp_path / "failing.yaml"
    file.write_text(
        f"config: {ROOT}/configs/quickstart.yaml\ndirectory: {tmp_path}/runs\n"
        f"settings: {{model.make: no, model.path: {tmp_path}/none, cluster.device: cpu}}\n"
        "seeds: [0, 1]\nretries: 0\nconcurrent: 2\n"
        "job: {gpus_per_node: 0, cpus_per_task: 4, exclusive: false, hours: 0.1}\n"
    )
    rows = sweep(file, "slurm")
    assert [(row["run"], row["state"]) for row in rows] == [("seed=0", "failed"), ("seed=1", "failed")]
    logs = [log.read_text() for log in (tmp_path / "runs" / "jobs").glob("*_log.out")]
    assert len(logs) == 2 and all(f"{tmp_path}/none: node node" in log for log in logs)
    assert_nothing_is_left(slurm)
