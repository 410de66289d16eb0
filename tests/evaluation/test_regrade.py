import json
from pathlib import Path

import pytest

from meds_megatron.cli import main
from meds_megatron.evaluation.records import read_records

ROWS = [
    {"generated_responses": [r"\boxed{5}", r"\boxed{500}"], "gold_answer": "5", "id": 3},
    {"generated_responses": [r"\boxed{1+x}", "no box"], "gold_answer": "x+1"},
    {"generated_responses": [r"\boxed{27.0}", r"\boxed{26}"], "gold_answer": 27.0, "is_correct": False},
]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def regraded(capsys, *arguments: str) -> dict:
    assert main(["eval", "--regrade", *arguments, "--workers", "1"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.usefixtures("processes")
def test_the_last_line_has_the_metrics_of_every_grader(tmp_path, capsys):
    path = write(tmp_path / "saved.jsonl", *ROWS)
    found = regraded(capsys, path, "--grader", "math_verify", "--grader", "strict", "--grader", "limo")
    assert (found["n"], found["accuracy"], found["errors"]) == (3, 0.5, 0)
    by_grader = found["metrics"]["saved"]
    assert [by_grader[name]["mean@2"] for name in ("math_verify", "strict", "limo")] == pytest.approx(
        [1 / 2, 1 / 3, 2 / 3]
    )
    assert by_grader["math_verify"]["pass@2"] == 1.0 and by_grader["strict"]["pass@2"] == pytest.approx(2 / 3)


def test_rows_need_nothing_but_responses_and_gold_answer(tmp_path, capsys):
    path = write(
        tmp_path / "saved.jsonl", {"settings": {}}, {"generated_responses": [r"\boxed{2}"], "gold_answer": "2"}
    )
    assert regraded(capsys, path) == {
        "n": 1,
        "accuracy": 1.0,
        "errors": 0,
        "metrics": {"saved": {"math_verify": {"mean@1": 1.0, "pass@1": 1.0, "errors": 0}}},
    }


def test_a_grading_that_fails_is_an_error_and_counts_in_no_metric(tmp_path, capsys):
    rows = [{"generated_responses": [r"\boxed{2}", r"\boxed{3}"], "gold_answer": gold} for gold in ("$$", "2")]
    found = regraded(capsys, write(tmp_path / "saved.jsonl", *rows))
    assert (found["n"], found["accuracy"], found["errors"]) == (2, 0.5, 2)


@pytest.mark.usefixtures("processes")
def test_the_rows_are_written_with_the_new_verdicts_in_limos_fields(tmp_path, capsys):
    out = tmp_path / "out" / "again.jsonl"
    regraded(
        capsys, write(tmp_path / "saved.jsonl", *ROWS), "--out", str(out), "--grader", "limo", "--grader", "strict"
    )
    header, first, *_ = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["settings"]["graders"] == ["limo", "strict"]
    assert first == {
        "id": 3,
        "generated_responses": [r"\boxed{5}", r"\boxed{500}"],
        "gold_answer": "5",
        "generated_answers": ["5", "500"],
        "is_correct": True,
        "answers_correctness": [True, True],
        "graders": {
            "strict": {"generated_answers": ["5", "500"], "is_correct": True, "answers_correctness": [True, False]}
        },
    }
    assert [record.gold for record in read_records(out)] == ["5", "x+1", "27"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], "row 2: expected an object"),
        ({"gold_answer": "1"}, "row 2: `generated_responses` must be a list of texts"),
        ({"generated_responses": "5", "gold_answer": "1"}, "row 2: `generated_responses` must be a list of texts"),
        ({"generated_responses": ["5"]}, "row 2: no `gold_answer`"),
        ({"generated_responses": ["5"], "gold_answer": {}}, "row 2: the answer in `gold_answer` must be"),
    ],
)
def test_a_broken_row_is_named(tmp_path, capsys, row, expected):
    path = write(tmp_path / "saved.jsonl", ROWS[0], row)
    assert main(["eval", "--regrade", path]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("meds: ") and f"{path}, {expected}" in shown and len(shown.splitlines()) == 1


def test_a_k_above_the_number_of_responses_is_refused(tmp_path, capsys):
    path = write(tmp_path / "saved.jsonl", *ROWS)
    assert main(["eval", "--regrade", path, "--k", "1,3"]) == 2
    assert "--k 3 needs as many responses" in capsys.readouterr().err
    assert main(["eval", "--regrade", path, "--k", "0"]) == 2
