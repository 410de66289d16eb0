"""Sweeps: which runs a file means, and what becomes of runs that fail or are finished. Whole runs: tests/slurm."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from meds_megatron.config import load_config, save_config
from meds_megatron.errors import UserError
from meds_megatron.sweeps import executors, sweep
from meds_megatron.sweeps.config import SweepRun, expand, load_sweep
from meds_megatron.sweeps.executors import LocalExecutor
from meds_megatron.sweeps.run import Sweep
from tests.faults.processes import restore_signals
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def write(directory: Path, text: str) -> Path:
    file = directory / "some.yaml"
    file.write_text(f"config: {QUICKSTART}\ndirectory: {directory}/runs\n{text}")
    return file


def finish(run: SweepRun, **metrics: float) -> None:
    """Writes a finished run's settings and last metrics."""
    run.directory.mkdir(parents=True)
    save_config(run.config, run.directory / "config.yaml")
    (run.directory / "metrics.jsonl").write_text(json.dumps({"step": run.steps} | metrics) + "\n")


def test_a_grid_has_every_combination_with_every_seed(tmp_path):
    file = write(tmp_path, "grid: {penalty.alpha: [0.1, 0.02], penalty.target: [wrong, both]}\nseeds: [3, 4]\n")
    runs = expand(load_sweep(file), file)
    assert [run.name for run in runs[:3]] == [
        "alpha=0.1,target=wrong,seed=3",
        "alpha=0.1,target=wrong,seed=4",
        "alpha=0.1,target=both,seed=3",
    ]
    assert len(runs) == 8 and len({run.directory for run in runs}) == 8
    assert runs[-1].differences == {"penalty.alpha": 0.02, "penalty.target": "both", "train.seed": 4}
    assert 'penalty.target="both"' in runs[-1].arguments


def test_the_published_ablations_are_valid_runs():
    file = ROOT / "configs" / "sweeps" / "penalty_qwen7b.yaml"
    runs = expand(load_sweep(file), file)
    assert {run.name for run in runs} >= {"dapo,seed=0", "all_layers,seed=1", "layer_difference,seed=2"}
    assert len(runs) == 33


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {penalty.alpa: [1]}", "some.yaml: unknown key `penalty.alpa`; did you mean `penalty.alpha`?"),
        ("sedes: [1]", "some.yaml: unknown key `sedes`; did you mean `seeds`?"),
        ("job: {node: 2}", "some.yaml: unknown key `job.node`; did you mean `job.nodes`?"),
        ("grid: {penalty.alpha: [-1]}", "the run alpha=-1,seed=0: penalty.alpha is -1"),
        ("grid: {penalty.alpha: []}", "grid.penalty.alpha is an empty list"),
        ("seeds: [1, 1]", "more than one run is seed=1"),
        ("concurrent: 0", "concurrent is 0, expected 1 or more"),
        ("job: {hours: 0}", "job.hours is 0.0, expected 0.0167 or more"),
        ("job: {cpus_per_task: 0}", "job.cpus_per_task is 0, expected 1 or more"),
        ("concurrent: many", "some.yaml: concurrent"),
        ("[", "not readable as YAML"),
    ],
)
def test_mistakes_are_named_in_a_sentence(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(UserError) as raised:
        expand(load_sweep(file), file)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.usefixtures("processes")
def test_failed_runs_are_tried_again_and_finished_ones_left_alone(tmp_path):
    """With real processes, of runs whose model is not there."""
    file = write(
        tmp_path,
        f"settings: {{model.make: no, model.path: {tmp_path}/none, train.steps: 7}}\n"
        "seeds: [0, 1]\nretries: 1\nmetrics: [accuracy/mean]\n",
    )
    finish(expand(load_sweep(file), file)[1], **{"accuracy/mean": 0.5})
    rows = sweep(file, executor="local")
    assert [(row["state"], row["step"], row["accuracy/mean"]) for row in rows] == [
        ("failed", 0, None),
        ("finished", 7, 0.5),
    ]
    with open(tmp_path / "runs" / "results.csv", newline="") as table:
        assert [row["state"] for row in csv.DictReader(table)] == ["failed", "finished"]
    logs = list((tmp_path / "runs" / "jobs").glob("*_log.err"))
    assert len(logs) == 2 and all(f"{tmp_path}/none does not exist" in log.read_text() for log in logs)


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    file = write(tmp_path, "settings: {train.steps: 7, optimizer.lr: 1.0e-3}\n")
    run = expand(load_sweep(file), file)[0]
    finish(run)
    # As a run saves what its config leaves open.
    saved = load_config(run.directory / "config.yaml")
    saved.policy.importance, saved.cluster.device = "none", "cpu"
    save_config(saved, run.directory / "config.yaml")
    assert [row["state"] for row in sweep(file, executor="local")] == ["finished"]
    write(tmp_path, "settings: {train.steps: 7, optimizer.lr: 3.0e-3}\n")
    with pytest.raises(UserError, match=f"{run.directory}: this finished run .*optimizer.lr: 0.001 -> 0.003"):
        sweep(file, executor="local")
    assert not list((tmp_path / "runs" / "jobs").glob("*"))


def test_a_second_process_on_the_same_sweep_is_refused(tmp_path):
    file = write(tmp_path, "")
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / "sweep.lock"), pytest.raises(UserError, match="another process runs this sweep"):
        sweep(file, executor="local")


def test_local_runs_have_gpus_of_their_own(tmp_path, monkeypatch):
    file = write(tmp_path, "seeds: [0, 1, 2]\nconcurrent: 3\njob: {gpus_per_node: 2}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,1")
    executor = local_executor(file)
    runs = Sweep(load_sweep(file), expand(load_sweep(file), file), executor)
    taken = []
    monkeypatch.setattr(executor._submitit, "submit", lambda _, arguments, visible: taken.append(visible) or SimpleJob)
    runs._update()
    assert taken == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(UserError, match=r"a run needs job\.gpus_per_node = 2, but this machine has 1 GPUs"):
        local_executor(file)


def test_a_run_that_ends_while_others_are_looked_at_keeps_its_gpus_until_then(tmp_path, monkeypatch):
    file = write(tmp_path, "seeds: [0, 1, 2]\nconcurrent: 2\njob: {gpus_per_node: 1}\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    executor, ended, taken = local_executor(file), set(), []

    class Job:
        job_id = "1"

        def done(self) -> bool:
            return self in ended

    monkeypatch.setattr(executor._submitit, "submit", lambda _, arguments, visible: taken.append(visible) or Job())
    first, second = (executor.submit(run) for run in expand(load_sweep(file), file)[:2])
    executor.refresh()
    ended.add(first)
    assert not executor.has_ended(first) and not executor.has_ended(second)
    executor.refresh()
    assert executor.has_ended(first) and not executor.has_ended(second)
    executor.submit(expand(load_sweep(file), file)[2])
    assert taken == ["4", "5", "4"]


def test_a_sweep_names_functions_as_its_runs_do_and_knows_them_before_any_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def loss(inputs, config):\n    pass\n")
    file = write(tmp_path, "settings: {policy.loss: 'mine.py:loss'}\n")
    assert expand(load_sweep(file), file)[0].config.policy.loss == f"{tmp_path}/mine.py:loss"
    file = write(tmp_path, "settings: {policy.loss: 'mine.py:los'}\n")
    with pytest.raises(
        UserError, match=r"some\.yaml: the run .*policy\.loss is .*mine\.py:los, but .* has no such name"
    ):
        expand(load_sweep(file), file)


def test_the_runs_of_a_seed_are_submitted_before_those_of_the_next(tmp_path, monkeypatch):
    file = write(tmp_path, "grid: {penalty.alpha: [0.1, 0.02]}\nseeds: [3, 1]\nconcurrent: 3\n")
    executor = local_executor(file)
    runs = Sweep(load_sweep(file), expand(load_sweep(file), file), executor)
    taken = []
    monkeypatch.setattr(
        executor._submitit, "submit", lambda _, arguments, visible: taken.append(arguments) or SimpleJob
    )
    runs._update()
    names = [next(entry for entry in arguments if entry.startswith("name=")) for arguments in taken]
    assert [name.partition(".")[2].strip('"') for name in names] == [
        "alpha=0.1,seed=3",
        "alpha=0.02,seed=3",
        "alpha=0.1,seed=1",
    ]


def test_only_the_named_runs_are_taken(tmp_path):
    file = write(tmp_path, "settings: {train.steps: 7}\nseeds: [0, 1, 2]\n")
    for run in expand(load_sweep(file), file)[::2]:
        finish(run)
    assert [row["run"] for row in sweep(file, executor="local", only={"seed=2", "seed=0"})] == ["seed=0", "seed=2"]


def local_executor(file: Path) -> LocalExecutor:
    config = load_sweep(file)
    return LocalExecutor(Path(config.directory) / "jobs", config.job)


class SimpleJob:
    job_id = "1"


@pytest.mark.usefixtures("processes")
def test_a_run_sees_the_gpus_that_it_was_given(monkeypatch, capfd, signal_handlers):
    """submitit hides all of them from its processes."""
    program = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"
    monkeypatch.setattr(executors, "_run_command", lambda arguments: [sys.executable, "-c", program])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [executors.train_here([], visible) for visible in ("4,5", "", None)] == [0, 0, 0]
    assert capfd.readouterr().out == "4,5\n\nNone\n"


def test_after_ctrl_c_local_runs_have_saved_themselves_and_go_on_at_the_next_start(
    tmp_path, run_meds, cpu_engines, small_model
):
    """SIGINT to the whole process group, as a terminal sends it."""
    settings = {
        "cluster.device": "cpu",
        "model.make": "no",
        "model.path": str(small_model),
        "data.limit_train": 6,
        "rollout.responses_per_prompt": 8,
        "filter.metric": "none",
        "train.steps": 200,
        "train.prompts_per_step": 4,
        "train.mini_batch_prompts": 4,
        "train.micro_batch_tokens": 4096,
        "train.validate_every": 0,
        "train.export_hf": False,
        "wandb.enabled": False,
    }
    file = write(tmp_path, f"settings: {json.dumps(settings)}\n")
    command = [sys.executable, "-m", "meds_megatron.cli", "sweep", str(file), "--executor", "local"]
    options = {"start_new_session": True, "preexec_fn": restore_signals}
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)
    run = tmp_path / "runs" / "seed=0"
    started = time.monotonic()
    while not last_step(run):
        assert process.poll() is None and time.monotonic() < started + HANG_SECONDS, process.communicate()
        time.sleep(0.2)
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 130 and "the sweep stops when its 1 runs have saved themselves" in errors
    assert not psutil.wait_procs(below, timeout=HANG_SECONDS)[1]
    step = last_step(run)
    assert 0 < step < 200 and (run / "checkpoints" / f"step_{step:06d}" / "complete.json").is_file()
    settings["train.steps"] = step + 1
    write(tmp_path, f"settings: {json.dumps(settings)}\n")
    assert [(row["state"], row["step"]) for row in sweep(file, executor="local")] == [("finished", step + 1)]
    logs = [log.read_text() for log in (tmp_path / "runs" / "jobs").glob("*_log.err")]
    assert any(f"resuming with train.steps: 200 -> {step + 1}" in log for log in logs), logs


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
