"""Engines that are killed while they generate and during a weight update: the run continues."""

import pytest

from tests.meds_runs import metrics_of, overrides

STEPS = 4
PROMPTS = 6
RESPONSES = 8
LAYOUTS = {
    # Each engine has one pipeline stage on its node and gets the other's weights over the network.
    "engines on the trainer's two nodes": {"cluster.nodes": 2, "cluster.ranks_per_node": 1, "rollout.engines": 2},
    "an engine of two ranks on its own node": {"rollout.tensor": 2, "rollout.nodes": 1},
}
SETTINGS = {
    "data.limit_train": PROMPTS,
    "filter.metric": "none",
    # Scores differ by length, so that there is something to learn whatever the answers are.
    "reward.overlong.buffer": 38,
    "train.steps": STEPS,
    "train.prompts_per_step": PROMPTS,
    "train.mini_batch_prompts": PROMPTS,
    "train.micro_batch_tokens": 1024,
    "train.validate_every": 0,
    "train.export_hf": "false",
    "optimizer.lr": 1e-4,
    "sync.checksum_every": 1,
}


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def run(request, run_meds, cpu_engines, small_model, tmp_path_factory):
    """A finished run's metrics, a dict a step, its output and its logs by process."""
    directory = tmp_path_factory.mktemp("run") / "run"
    settings = overrides(directory, small_model, SETTINGS | request.param)
    finished = run_meds.run_module("tests.faults.killed_engines_run", "configs/quickstart.yaml", *settings)
    run_meds.check(finished)
    logs = {path.stem: path.read_text() for path in (directory / "logs").iterdir()}
    return metrics_of(directory), finished.stdout + finished.stderr, logs


def test_every_step_is_made_with_all_its_responses(run):
    metrics, *_ = run
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert all(line["response/count"] == PROMPTS * RESPONSES for line in metrics)


def test_failures_are_counted_and_logged(run):
    metrics, output, logs = run
    assert [line["rollout/engine_restarts"] for line in metrics] == [0, 1, 1, 0]
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
