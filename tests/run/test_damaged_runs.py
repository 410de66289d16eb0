"""Damage to the files of a run directory: a sentence, or a checkpoint that is passed over."""

import json
from pathlib import Path

import pytest

from meds_megatron.config import Config, save_config
from meds_megatron.errors import UserError
from meds_megatron.plan.calibration import measure
from meds_megatron.run.checkpoint_files import mark_complete, newest, write_state
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.metrics_file import read_metrics
from meds_megatron.run.reader import read_run as read_report
from meds_megatron.sweeps.run import last_metrics

DAMAGED_LINES = {
    "a list": "[1, 2]",
    "a number": "7",
    "null": "null",
    "no step": '{"accuracy/mean": 0.5}',
    "a step that is a text": '{"step": "2"}',
    "a step that is no whole number": '{"step": 2.5}',
    "a step that is true": '{"step": true}',
    "a value that is a text": '{"step": 2, "accuracy/mean": "good"}',
    "nested too deep": '{"step": ' + "[" * 10**5,
    "bytes": "\xff\x00",
}
READERS = {
    "resuming": lambda run: RunDirectory(run).last_logged_step(),
    "rewinding": lambda run: RunDirectory(run).rewind(3),
    "report": read_report,
    "plan": lambda run: measure(run, prompt_share=0.5),
    "sweep": last_metrics,
}


def run_with(directory: Path, *lines: str) -> Path:
    save_config(Config(run_dir=str(directory)), directory / "config.yaml")
    (directory / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="latin-1")
    return directory


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_a_damaged_line_of_metrics_is_named_by_its_number(tmp_path, line, reader):
    run = run_with(tmp_path, '{"step": 1}', DAMAGED_LINES[line], '{"step": 3}')
    sentence = r"metrics.jsonl line 2: expected a JSON object with a `step` and numbers; remove the line"
    with pytest.raises(UserError, match=sentence):
        READERS[reader](run)


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_a_damaged_line_at_the_end_of_the_metrics_is_left_out(tmp_path, line):
    run = run_with(tmp_path, '{"step": 1}', '{"step": 2, "policy/kl": null}', DAMAGED_LINES[line])
    assert [line.step for line in read_metrics(run / "metrics.jsonl")] == [1, 2]
    RunDirectory(run).rewind(2)
    assert (run / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "policy/kl": null}\n'


def test_a_saved_config_that_is_nested_too_deep_is_one_sentence(tmp_path):
    run = run_with(tmp_path, '{"step": 1}')
    (run / "config.yaml").write_text("[" * 10**5)
    with pytest.raises(UserError, match=r"config\.yaml: not readable as YAML"):
        read_report(run)


def checkpoint(directory: Path, step: int) -> Path:
    path = directory / f"step_{step:06d}"
    path.mkdir()
    write_state(path, {"step": step}, 0, {"tensor": 1})
    return path


STATE = {"format": 1, "layout": {"tensor": 1}, "state": {"step": 10}}
DAMAGED_STATES = {
    "null": (None, "state.json is no JSON object"),
    "a list": ([STATE], "state.json is no JSON object"),
    "no layout": ({"format": 1, "state": {"step": 10}}, "state.json has no state or no layout"),
    "no state": ({"format": 1, "layout": {}}, "state.json has no state or no layout"),
    "a state that is a list": (STATE | {"state": [10]}, "state.json has no state or no layout"),
    "no step": (STATE | {"state": {}}, "state.json is of step None, expected 10"),
    "another step": (STATE | {"state": {"step": 7}}, "state.json is of step 7, expected 10"),
}


@pytest.mark.parametrize("damage", DAMAGED_STATES)
def test_a_checkpoint_whose_state_is_damaged_is_passed_over(tmp_path, caplog, damage):
    content, sentence = DAMAGED_STATES[damage]
    mark_complete(checkpoint(tmp_path, 5))
    damaged = checkpoint(tmp_path, 10)
    (damaged / "state.json").write_text(json.dumps(content))
    mark_complete(damaged)
    assert newest(tmp_path).step == 5
    assert f"step_000010/{sentence}: the checkpoint is passed over" in caplog.text


def test_a_state_that_is_nested_too_deep_is_passed_over(tmp_path, caplog):
    damaged = checkpoint(tmp_path, 10)
    (damaged / "state.json").write_text("[" * 10**5)
    mark_complete(damaged)
    with pytest.raises(UserError, match=r"state.json cannot be read \(nested too deep\)"):
        newest(tmp_path)


def test_rewinding_removes_links_and_leaves_what_they_lead_to(tmp_path):
    run, elsewhere = RunDirectory(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    for directory in (run.rollouts, run.exports):
        directory.mkdir(parents=True)
        (directory / "step_000009").symlink_to(elsewhere)
    (run.rollouts / "step_000008.parquet").symlink_to(tmp_path / "nothing")
    run.rewind(3)
    assert list(run.rollouts.iterdir()) == list(run.exports.iterdir()) == []
    assert (elsewhere / "kept").exists()


def test_what_cannot_be_removed_is_one_sentence(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.rollouts.mkdir()
    (run.rollouts / "step_000009.parquet").touch()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    sentence = r"step_000009.parquet cannot be removed or written \(Permission denied\), which a run that continues"
    with pytest.raises(UserError, match=sentence):
        run.rewind(3)
