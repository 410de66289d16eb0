"""Files and messages of `meds report`, without a browser."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from meds_megatron.cli import main
from meds_megatron.config import MemoryConfig
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.reader import read_run
from meds_megatron.trainer.main import report
from tests.report.planted_run import write_planted_run


@pytest.fixture
def run(tmp_path) -> Path:
    return write_planted_run(tmp_path / "run", steps=2)


def test_the_page_of_one_run_is_in_it(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "https:" not in page.replace("https://github.com/leeoniya/uPlot", "")
    assert [path.name for path in run.glob("*.partial")] == []


def test_the_page_of_several_runs_is_in_the_working_directory(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(run)]) == 0
    assert (tmp_path / "report.html").exists() and not (run / "report.html").exists()


def test_a_line_that_is_still_being_written_is_left_out(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "accur')
    assert main(["report", str(run)]) == 0


def test_a_run_of_another_version_has_its_report(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"]["no_longer_known"] = 3
    config["memory"] |= {"method": "single", "removed": True}
    del config["memory"]["knn"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    files = read_run(run)
    assert files.settings["train.no_longer_known"] == 3
    assert files.memory == MemoryConfig(method="single")
    assert main(["report", str(run)]) == 0


def damaged(run: Path, damage: str) -> str:
    """Damages the run and returns what the sentence about it names."""
    step = run / "rollouts" / "step_000002.parquet"
    if damage == "no run":
        (run / "metrics.jsonl").unlink()
        return f"{run}: expected a run directory with config.yaml and metrics.jsonl"
    if damage == "settings":
        (run / "config.yaml").write_text("a: [")
        return f"{run}/config.yaml: not readable as YAML"
    if damage == "metrics":
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join([lines[0], "nonsense", *lines[1:]]) + "\n")
        return f"{run}/metrics.jsonl line 2: expected a JSON object"
    if damage == "parquet":
        step.write_bytes(step.read_bytes()[:-100])
        return f"{step}: not readable as parquet"
    pq.write_table(pq.read_table(step).drop_columns(["penalty"]), step)
    return f"{step}: there is no column `penalty`"


@pytest.mark.parametrize("damage", ["no run", "settings", "metrics", "parquet", "column"])
def test_a_damaged_run_is_one_sentence(run, damage, capsys):
    expected = damaged(run, damage)
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.splitlines()) == 1
    assert not list(run.glob("report*"))


def test_a_page_that_cannot_be_written_is_one_sentence_and_leaves_nothing(run, capsys):
    assert main(["report", str(run), "--out", str(run / "missing" / "page.html")]) == 2
    said = capsys.readouterr().err
    assert "page.html cannot be written (No such file or directory)" in said and len(said.splitlines()) == 1


def test_a_finished_run_names_its_report(run, capsys):
    report(RunDirectory(run))
    assert capsys.readouterr().err == f"meds: the report of the run is {run}/report.html\n"
    assert (run / "report.html").exists()


def test_a_report_that_fails_does_not_fail_the_run(run, capsys):
    damaged(run, "parquet")
    report(RunDirectory(run))
    said = capsys.readouterr().err
    assert said.startswith(f"meds: there is no report of the run ({run}/rollouts/step_000002.parquet: not readable")
    assert said.endswith(f"try `meds report {run}`\n") and len(said.splitlines()) == 1
