"""Memories that are compared on mistakes written by hand."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from meds_megatron.config import MemoryConfig, load_config, save_config
from meds_megatron.toy_tasks.remainder import DIVISOR
from tests.tools.test_study import study_plan, write_step

study_memories = importlib.import_module("study_memories")
A, B = (study_memories.Mistake("p", rule, vector_L) for rule, vector_L in zip("AB", np.eye(2, 3), strict=True))
STEPS = [[A] * 6 + [B] * 2] * 8
"""From the fifth step on, which count, a memory holds 24 of one mistake and 8 of the other, or more."""


def looked_up(**settings) -> dict[str, float]:
    return study_memories.looked_up(STEPS, MemoryConfig(last_n_layers=3, **settings))


def test_a_memory_that_keeps_everything_gives_both_mistakes_the_largest_penalty():
    assert looked_up() == {"saturated": 1.0, "spread": 0.0, "rank": 0.0, "ari": 1.0}


def test_sizes_that_fade_tell_them_apart():
    # With 0.25 + 0.25 ** 2 + ..., 6 and 2 a step are 2.0 and 0.67, rounded 2 and 1.
    found = looked_up(half_life_steps=0.5)
    expected = np.std([np.log(3)] * 6 + [np.log(2)] * 2)
    assert found == {"saturated": 0.0, "spread": pytest.approx(expected), "rank": pytest.approx(1.0), "ari": 1.0}


def test_a_window_holds_the_newest_only():
    # Of the last 4 in order of their rows, 2 are of each mistake.
    found = looked_up(window=4)
    assert (found["saturated"], found["spread"], found["ari"]) == (0.0, 0.0, 1.0)
    assert np.isnan(found["rank"])


def test_a_single_cluster_agrees_with_no_mistake():
    found = looked_up(method="single")
    assert (found["saturated"], found["rank"], found["ari"]) == (1.0, 0.0, 0.0)


def run_directory(directory: Path) -> Path:
    config = load_config(study_plan.BASE, [f"run_dir={directory}", "memory.window=3"])
    for step in range(1, 7):
        wrong = [(rule, DIVISOR, np.eye(4)[rule].tolist()) for rule in (1, 1, 2)]
        write_step(directory, step, [[(0, DIVISOR, [0.0] * 4), *wrong]])
    save_config(config, directory / "config.yaml")
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 6}) + "\n")
    return directory


def test_the_table_of_a_run(tmp_path, capsys):
    assert study_memories.main([str(run_directory(tmp_path)), "--memory", "window=6", "noise=ignore"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(study_memories.MEMORIES) + 1
    # Of 6 steps the last 3 count, before which 6 of one mistake and 3 of the other are held, then 8 and 4, 10 and 5.
    spread = np.mean([np.std(np.minimum(np.log1p(held), 2)) for held in ([6, 6, 3], [8, 8, 4], [10, 10, 5])])
    assert rows[2] == f"| keeps everything | {4 / 9:.2f} | {spread:.2f} | 1.00 | 1.00 |"
    assert rows[-1].startswith("| window=6, noise=ignore | 0.00 |")


def test_workings_that_follow_no_rule_are_one_mistake(tmp_path, capsys):
    run = run_directory(tmp_path)
    broken = [(None, DIVISOR, vector_L) for vector_L in ([1.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0])]
    for step in range(1, 7):
        write_step(run, step, [[(0, DIVISOR, [0.0] * 4), *broken, (2, DIVISOR, [0.0, 0.0, 1.0, 0.0])]])
    (step, *_) = study_memories.mistakes_of(study_memories.read_run(run))
    first, second, other = (mistake.rule for mistake in step)
    assert first == second == study_memories.NO_RULE != other
    assert study_memories.main([str(run)]) == 0
    assert "| keeps everything | " in capsys.readouterr().out


def test_what_is_wrong_is_said(tmp_path, capsys):
    assert study_memories.main([str(tmp_path / "none")]) == 1
    assert "expected a run directory" in capsys.readouterr().err
    assert study_memories.main([str(run_directory(tmp_path)), "--memory", "windo=6"]) == 1
    assert "--memory windo=6: expected key=value" in capsys.readouterr().err
    assert study_memories.main([str(run_directory(tmp_path / "other")), "--memory", "window=[6"]) == 1
    assert "--memory window=[6: the value is not readable as YAML" in capsys.readouterr().err
