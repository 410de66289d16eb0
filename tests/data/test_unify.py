"""The training set: both formats, duplicates, contamination, and files that `meds train` takes."""

import json
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from meds_megatron.cli import main
from meds_megatron.data.duplicates import NEAR, NearIndex, numbers, same_words, shingles
from meds_megatron.data.problems import load_problems
from meds_megatron.data.rows import read_rows
from meds_megatron.data.unify import without_instruction

OPENING = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem."
)
CLOSING = 'Remember to put your answer on its own line after "Answer:".'
BAKER = "A baker makes {} loaves in the morning and twice as many in the afternoon, how many does she make on that day?"


def dapo_row(question: str, answer: str) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"{OPENING}\n\n{question}\n\n{CLOSING}"}],
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    }


def math_row(problem: str, answer: str, level: object = "Level 5") -> dict:
    return {"problem": problem, "level": level, "type": "Algebra", "solution": f"So it is $\\boxed{{{answer}}}$."}


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def unified(capsys, tmp_path: Path, *options: str) -> tuple[dict, list[dict]]:
    out = tmp_path / "unified.parquet"
    assert main(["data", "unify", "--out", str(out), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1]), [row for _, row in read_rows(out)]


def test_both_formats_become_one_file(tmp_path, capsys):
    dapo = tmp_path / "dapo.parquet"
    two_paragraphs = "Let $a=2$.\n\nFind $a^2$."
    parquet.write_table(
        pa.Table.from_pylist([dapo_row(two_paragraphs, "4"), dapo_row("What is $3^2$?", "9")] * 3), dapo
    )
    levels = [(1, "Level 1"), (2, 2), (3, "Level 3"), (4, 4), (5, "Level 5"), (6, "Level ?")]
    math = jsonl(tmp_path / "math.jsonl", *(math_row(f"Solve $x={n}$ for x.", str(n), level) for n, level in levels))
    counts, rows = unified(capsys, tmp_path, "--dapo", str(dapo), "--math", math)
    assert counts["rows"] == {"dapo": 6, "math": 6}
    assert counts["left out"] == {"the same words": 4, "another level": 3}
    expected = [(two_paragraphs, "4", None), ("What is $3^2$?", "9", None)]
    expected += [(f"Solve $x={n}$ for x.", str(n), n) for n in (3, 4, 5)]
    assert [(row["question"], row["answer"], row["level"]) for row in rows] == expected
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    assert rows[0]["prompt"] == [{"role": "system", "content": system}, {"role": "user", "content": two_paragraphs}]
    assert [(row["source"], row["problems"]) for row in counts["summary"]][-1] == ("all", 5)


def test_meds_train_reads_the_file(tmp_path, capsys):
    math = jsonl(
        tmp_path / "math.jsonl", math_row("What is 1+1?", "2"), math_row("What is $\\frac12$ of 3?", "\\frac32")
    )
    _, rows = unified(capsys, tmp_path, "--math", math)
    problems = load_problems([str(tmp_path / "unified.parquet")])
    assert [(p.id, p.question, p.answer) for p in problems] == [(r["id"], r["question"], r["answer"]) for r in rows]


def test_ids_do_not_depend_on_file_and_order(tmp_path, capsys):
    rows = [math_row(f"What is {n} + {n}?", str(2 * n)) for n in range(5)]
    _, first = unified(capsys, tmp_path, "--math", jsonl(tmp_path / "a.jsonl", *rows))
    _, second = unified(capsys, tmp_path, "--math", jsonl(tmp_path / "b.jsonl", *reversed(rows)))
    assert [row["id"] for row in first] == [row["id"] for row in reversed(second)]
    assert len({row["id"] for row in first}) == 5


def test_duplicates_are_found_in_the_same_and_in_nearly_the_same_words(tmp_path, capsys):
    rows = [
        math_row(BAKER.format(12), "36"),
        math_row(" " + BAKER.format("$12$").upper(), "36"),
        math_row(BAKER.format(12).replace("on that day", "in that day"), "36"),
        math_row(BAKER.format(13), "39"),
        math_row(BAKER.format(12), "24"),
    ]
    counts, kept = unified(capsys, tmp_path, "--math", jsonl(tmp_path / "math.jsonl", *rows))
    assert counts["left out"] == {
        "the same words": 1,
        "nearly the same words": 1,
        "the same words, another answer": 1,
    }
    assert [row["answer"] for row in kept] == ["36", "39"], "other numbers make another problem"


def test_contaminated_problems_are_reported_and_removed_on_request(tmp_path, capsys):
    rows = [math_row(BAKER.format(12), "36"), math_row("What is $2+2$?", "4"), math_row("What is 5+5?", "10")]
    math = jsonl(tmp_path / "math.jsonl", *rows)
    test_set = [{"id": "a", "question": "what is 2 + 2?", "answer": "4"}]
    test_set += [{"id": "b", "question": BAKER.format(12).replace("on that", "in that"), "answer": "36"}]
    test = jsonl(tmp_path / "test.jsonl", *test_set)
    counts, kept = unified(capsys, tmp_path, "--math", math, "--evaluation", test)
    assert (counts["in evaluation sets"], len(kept)) == (2, 3)
    listed = [json.loads(line) for line in (tmp_path / "unified_contaminated.jsonl").read_text().splitlines()]
    assert [(pair["evaluation"], pair["how"]) for pair in listed] == [(f"{test}: a", "exact"), (f"{test}: b", "near")]
    _, kept = unified(capsys, tmp_path, "--math", math, "--evaluation", test, "--remove-contaminated")
    assert [row["answer"] for row in kept] == ["10"]


def test_near_duplicates_are_those_of_all_pairs(shared_data):
    """The index against a comparison of every pair, on problems of which many are alike."""
    problems = [p.question for p in load_problems([str(shared_data / "data" / "math500.jsonl")], 150)]
    questions = problems + [text.replace("the", "a", 1) + " Thank you." for text in problems]
    words = [shingles(text) for text in questions]
    expected = {
        (a, b)
        for a, b in combinations(range(len(questions)), 2)
        if numbers(questions[a]) == numbers(questions[b])
        and len(words[a] & words[b]) >= NEAR * len(words[a] | words[b])
    }
    index, found = NearIndex(), set()
    for number, text in enumerate(questions):
        found |= {(near, number) for near in index.matches(text)}
        index.add(text)
    assert len(expected) > 50 and found <= expected
    assert len(found) >= 0.98 * len(expected), "hashing may miss a pair that is hardly near"


def test_gsm8k_in_both_formats(shared_data, tmp_path, capsys):
    problems = load_problems([str(shared_data / "data" / "gsm8k_test.jsonl")], 200)
    dapo = jsonl(tmp_path / "dapo.jsonl", *(dapo_row(p.question, p.answer) for p in problems[:120]))
    math = jsonl(tmp_path / "math.jsonl", *(math_row(p.question, p.answer) for p in problems[80:]))
    counts, kept = unified(capsys, tmp_path, "--dapo", dapo, "--math", math)
    assert counts["left out"] == {"the same words": 40}
    assert [(row["question"], row["answer"]) for row in kept] == [(p.question.strip(), p.answer) for p in problems]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"problem": "half', "row 2: not valid JSON"),
        ({"level": "Level 3", "solution": "\\boxed{1}"}, "row 2: no question"),
        ({"problem": "?", "level": "Level 3", "solution": "no box"}, "row 2: the solution has no"),
        ({"problem": "?", "level": "hard", "solution": "\\boxed{1}"}, "row 2: `level` must be a number or a text"),
    ],
)
def test_a_broken_row_is_named_with_its_file_and_line(tmp_path, capsys, row, expected):
    path = tmp_path / "math.jsonl"
    lines = [json.dumps(math_row("fine?", "1")), row if isinstance(row, str) else json.dumps(row)]
    path.write_text("\n".join(lines) + "\n")
    assert main(["data", "unify", "--math", str(path), "--out", str(tmp_path / "out.parquet")]) == 2
    shown = capsys.readouterr().err
    assert f"meds: {path}, {expected}" in shown and len(shown.splitlines()) == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--out", "x.parquet"], "expected --dapo FILE, --math FILE or both"),
        (["--math", "x.jsonl", "--out", "x.jsonl"], "does not end in .parquet"),
        (["--math", "x.jsonl", "--out", "x.parquet"], "x.jsonl is no file"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, options, expected):
    assert main(["data", "unify", *options]) == 2
    shown = capsys.readouterr().err
    assert expected in shown and len(shown.splitlines()) == 1


def test_inspect_counts_and_names_what_cannot_be_read(tmp_path, capsys):
    rows = [math_row("What is 1+1?", "2", 3), math_row("what is 1 + 1?", "2", 3), {"problem": "no answer"}]
    rows += [math_row("?" * 150, "\\frac{1}{2}", 4), math_row("How?", "x+1", 4)]
    path = jsonl(tmp_path / "math.jsonl", *rows)
    assert main(["data", "inspect", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["rows"], found["problems"], found["repeated"], found["broken_rows"]) == (5, 4, 1, 1)
    assert found["answers"] == {"whole number": 2, "number": 1, "other": 1}
    assert [(row["level"], row["problems"], row["<100"], row["<200"]) for row in found["summary"]] == [
        ("3", 2, 2, 0),
        ("4", 2, 1, 1),
        ("", 4, 3, 1),
    ]
    assert found["broken"][0].startswith(f"{path}, row 3: no answer")


def test_the_instruction_of_dapo_is_taken_off():
    assert without_instruction(f"{OPENING}\n\nWhat?\n\n{CLOSING}") == "What?"
    assert without_instruction(" What?\n\nAnd why? ") == "What?\n\nAnd why?"
    assert same_words("What is\\, $\\left(1\\right)$ ?") == same_words("what is (1)?")
