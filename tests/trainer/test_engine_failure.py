"""Engines that are killed while they generate and during a weight update: the run goes on."""

import json
import subprocess
import sys

import pytest

STEPS = 5
PROMPTS = 6
RESPONSES = 8
SETTINGS = {
    # Each engine has one pipeline stage on its node and gets the other's weights over the network.
    "engines on the trainer's two nodes": ["cluster.nodes=2", "cluster.ranks_per_node=1", "rollout.engines=2"],
    "an engine of two ranks on its own node": ["rollout.tensor=2", "rollout.nodes=1"],
}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS)
def run(request, small_model, tmp_path_factory, cpu_engines):
    """A finished run's metrics, a dict a step, its output and its logs by process."""
    directory = tmp_path_factory.mktemp("run") / "run"
    command = [sys.executable, "-m", "tests.trainer.killed_engines_run", "configs/quickstart.yaml", *request.param]
    command += [
        f"run_dir={directory}",
        "model.make=no",
        f"model.path={small_model}",
        "cluster.device=cpu",
        f"data.limit_train={PROMPTS}",
        "filter.metric=none",
        # Scores differ by length, so that there is something to learn whatever the answers are.
        "reward.overlong.buffer=38",
        f"rollout.responses_per_prompt={RESPONSES}",
        f"train.steps={STEPS}",
        f"train.prompts_per_step={PROMPTS}",
        f"train.mini_batch_prompts={PROMPTS}",
        "train.micro_batch_tokens=1024",
        "train.validate_every=0",
        "train.export_hf=false",
        "optimizer.lr=1e-4",
        "sync.checksum_every=1",
        "wandb.enabled=false",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=900)
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-6000:]
    logs = {path.stem: path.read_text() for path in (directory / "logs").iterdir()}
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return metrics, output, logs


def test_every_step_is_made_with_all_its_responses(run):
    metrics, *_ = run
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["response/count"] == PROMPTS * RESPONSES for line in metrics)


def test_failures_are_counted_and_logged(run):
    metrics, output, logs = run
    assert [line["rollout/engine_restarts"] for line in metrics] == [0, 1, 1, 0, 0]
    regenerated = [line["rollout/regenerated_prompts"] for line in metrics]
    assert regenerated[1] > 0 == regenerated[0] == sum(regenerated[2:])
    assert output.count("killing process") == 2
    assert output.count("failed and is restarted") == 2
    assert logs["driver"].count("failed and is restarted") == logs["driver"].count("all that engine") == 2
    loaded = [text.count("has loaded") for process, text in logs.items() if process.startswith("engine")]
    assert sum(loaded) == len(loaded) + 2, "a restarted engine writes on in its log"


def test_engines_have_the_trainers_weights_in_the_next_steps(run):
    metrics, *_ = run
    for line in metrics:
        assert 0 < line["mismatch/logprob_abs_max"] < 1e-3
        assert line["policy/grad_norm"] > 0
