"""Signals stop a run between two steps: saved, with an exit code for schedulers, and nothing left behind."""

import json
import os
import signal
import time

import pytest

from tests.faults.campaign import Run
from tests.faults.processes import RunProcess, running, shared_files
from tests.limits import HANG_SECONDS

STEPS = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory, run_meds, cpu_engines, small_model):
    """A run whose first process gets SIGTERM and whose second one Ctrl-C: for each its exit code, output, logged steps,
    newest checkpoint and what it left."""
    directory = tmp_path_factory.mktemp("signals")
    settings = [*Run.settings(directory / "run", small_model, STEPS), "checkpoint.every=100"]
    return [stopped(settings, directory, number) for number in (signal.SIGTERM, signal.SIGINT)]


def stopped(settings: list[str], directory, number: signal.Signals) -> dict:
    output, metrics = directory / f"{number.name}.out", directory / "run" / "metrics.jsonl"
    before = metrics.read_text() if metrics.exists() else ""
    process = RunProcess(settings, output)
    while (not metrics.exists() or len(metrics.read_text()) <= len(before)) and process.poll() is None:
        time.sleep(0.05)
    descendants = process.descendants()
    shared = shared_files(descendants)
    # Ctrl-C reaches the whole process group.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    code = process.wait(timeout=HANG_SECONDS)
    return {
        "code": code,
        "output": output.read_text(),
        "steps": [json.loads(line)["step"] for line in metrics.read_text().splitlines()],
        "checkpoints": sorted(path.parent.name for path in directory.glob("run/checkpoints/*/complete.json")),
        "left": running(descendants) + [str(path) for path in shared if path.exists()],
    }


def test_exit_codes_are_those_that_schedulers_expect(run):
    assert [part["code"] for part in run] == [75, 130]


def test_the_last_finished_step_is_saved_and_the_user_knows(run):
    for part, name in zip(run, ("SIGTERM", "SIGINT"), strict=True):
        last = part["steps"][-1]
        assert part["steps"] == list(range(1, last + 1)) and last < STEPS
        assert part["checkpoints"][-1] == f"step_{last:06d}"
        line = part["output"].splitlines()[-1]
        assert line.startswith(f"meds: {name} stopped the run after step {last}: ") and line.endswith(
            f"step_{last:06d}"
        )


def test_the_second_process_continued_where_the_first_one_stopped(run):
    first, second = run
    assert len(second["steps"]) > len(first["steps"])
    assert f"step {first['steps'][-1] + 1}/" in second["output"] and "step 1/" not in second["output"]


def test_nothing_runs_on_or_stays_in_shared_memory(run):
    assert [part["left"] for part in run] == [[], []]
