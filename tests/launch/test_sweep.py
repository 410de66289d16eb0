"""Sweeps: which runs a file means, and what becomes of runs that fail or are finished. Whole runs: tests/slurm."""

import csv
import json
from pathlib import Path

import pytest

from meds_megatron.errors import UserError
from meds_megatron.launch import sweep
from meds_megatron.launch.sweep_config import expand, load_sweep

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def write(directory: Path, text: str) -> Path:
    file = directory / "some.yaml"
    file.write_text(f"config: {QUICKSTART}\ndirectory: {directory}/runs\n{text}")
    return file


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
        ("concurrent: many", "some.yaml: concurrent"),
        ("[", "not readable as YAML"),
    ],
)
def test_mistakes_are_named_in_a_sentence(tmp_path, text, message):
    file = write(tmp_path, text)
    with pytest.raises(UserError) as raised:
        expand(load_sweep(file), file)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_failed_runs_are_tried_again_and_finished_ones_left_alone(tmp_path):
    """With real processes, of runs whose model is not there."""
    file = write(
        tmp_path,
        f"settings: {{model.make: no, model.path: {tmp_path}/none, train.steps: 7}}\n"
        "seeds: [0, 1]\nretries: 1\nmetrics: [accuracy/mean]\n",
    )
    finished = tmp_path / "runs" / "seed=1"
    finished.mkdir(parents=True)
    (finished / "metrics.jsonl").write_text(json.dumps({"step": 7, "accuracy/mean": 0.5}) + "\n")
    rows = sweep(file, executor="local")
    assert [(row["state"], row["step"], row["accuracy/mean"]) for row in rows] == [
        ("failed", 0, None),
        ("finished", 7, 0.5),
    ]
    with open(tmp_path / "runs" / "results.csv", newline="") as table:
        assert [row["state"] for row in csv.DictReader(table)] == ["failed", "finished"]
    logs = list((tmp_path / "runs" / "jobs").glob("*_log.err"))
    assert len(logs) == 2 and all(f"{tmp_path}/none does not exist" in log.read_text() for log in logs)
