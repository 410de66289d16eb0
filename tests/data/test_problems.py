import json
from functools import partial
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from meds_megatron.data.problems import Problem, load_problems
from meds_megatron.errors import UserError
from meds_megatron.toy_tasks.arithmetic import arithmetic_problems


def write_jsonl(path: Path, *rows: object) -> str:
    """Rows as lines; a row that is bytes goes in as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def write_parquet(path: Path, *rows: dict) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def verl_row(index: object, answer: str = "34") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "Solve it.\n\nWhat is 30 + 4?\n\nRemember the last line."}],
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


@pytest.mark.parametrize(
    ("file", "count", "identity", "answer", "opening"),
    [
        ("gsm8k_train", 7473, "gsm8k_train:1", "72", "Natalia sold clips"),
        ("gsm8k_test", 1319, "gsm8k_test:1", "18", "Janet"),
        ("math500", 500, "test/precalculus/807.json", "\\left( 3, \\frac{\\pi}{2} \\right)", "Convert the point"),
        ("aime24", 30, "aime24:60", "204", "Every morning Aya"),
        ("amc23", 40, "amc23:0", "27", "Cities $A$ and $B$"),
    ],
)
def test_real_data_sets_load_whole(shared_data, file, count, identity, answer, opening):
    problems = load_problems([str(shared_data / "data" / f"{file}.jsonl")])
    assert len(problems) == count
    assert len({problem.id for problem in problems}) == count
    assert (problems[0].id, problems[0].answer, problems[0].source) == (identity, answer, file)
    assert {problem.dataset for problem in problems} == {file}
    assert problems[0].question.startswith(opening)


def test_gsm8k_answers_are_what_follows_the_mark(shared_data):
    problems = load_problems([str(shared_data / "data" / "gsm8k_train.jsonl")])
    assert all(problem.answer.lstrip("-").replace(",", "").replace(".", "").isdigit() for problem in problems)


def test_sources_follow_each_other_up_to_the_limit(tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", {"question": "a", "answer": "1"}, {"question": "b", "answer": "2"})
    second = write_parquet(
        tmp_path / "second.parquet", {"problem": "c", "answer": "3"}, {"problem": "d", "answer": "4"}
    )
    assert [p.question for p in load_problems([first, second])] == ["a", "b", "c", "d"]
    assert [p.question for p in load_problems([first, second], 3)] == ["a", "b", "c"]
    assert [p.question for p in load_problems([first, second], 2)] == ["a", "b"]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Think."}]])
@pytest.mark.parametrize(
    "assistant", [[], [{"role": "assistant", "content": ""}], [{"role": "assistant", "content": None}]]
)
def test_only_the_users_message_of_a_chat_is_kept(tmp_path, write, system, assistant):
    messages = [*system, {"role": "user", "content": "What is 30 + 4?"}, *assistant]
    path = write(tmp_path / f"chat.{write.__name__.removeprefix('write_')}", {**verl_row("a"), "prompt": messages})
    assert load_problems([path]) == [Problem("a", "What is 30 + 4?", "34", "chat")]


def test_verl_rows_keep_their_prompt_and_index(tmp_path):
    path = write_parquet(tmp_path / "dapo.parquet", verl_row("9a9b6eb4-a1cb"), verl_row("1aaab07f-1caf"))
    problems = load_problems([path])
    question = "Solve it.\n\nWhat is 30 + 4?\n\nRemember the last line."
    assert problems[0] == Problem("9a9b6eb4-a1cb", question, "34", "dapo")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "x", "question": "q", "answer": "5"}, ("x", "q", "5")),
        ({"id": 7, "question": "q", "answer": 5}, ("file:7", "q", "5")),
        ({"id": None, "prompt": "q", "answer": 0.5}, ("file:1", "q", "0.5")),
        ({"problem": "q", "solution": "so \\boxed{\\frac{1}{2}}."}, ("file:1", "q", "\\frac{1}{2}")),
        ({"problem": "q", "answer": "it is $\\boxed{12}$"}, ("file:1", "q", "12")),
        ({"question": "q", "answer": "2+2=4\n#### 1,400 "}, ("file:1", "q", "1,400")),
        ({"question": "q", "answer": 100.0}, ("file:1", "q", "100")),
        ({"Question": "q", "answer": 27.0}, ("file:1", "q", "27")),
        ({"input": "q", "answer": ["$2$", 3.0, "4.5"]}, ("file:1", "q", "$2$, 3, 4.5")),
        ({"question": "q", "problem": "p", "answer": ["\\boxed{7}"]}, ("file:1", "q", "7")),
    ],
)
def test_generic_rows(tmp_path, row, expected):
    problem = load_problems([write_jsonl(tmp_path / "file.jsonl", row)])[0]
    assert (problem.id, problem.question, problem.answer) == expected


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    """Python's own idea of lines would also end them at the separators that JSON texts may hold."""
    question = "a\u2028b\u2029c\x85d\x0be"
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({"question": question, "answer": "1"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [problem.question for problem in load_problems([str(path)])] == [question]


def test_blank_lines_are_counted_but_are_no_problems(tmp_path):
    path = write_jsonl(tmp_path / "file.jsonl", {"question": "a", "answer": "1"}, b"", {"question": "b", "answer": "2"})
    assert [p.id for p in load_problems([path])] == ["file:1", "file:3"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (b"{not json", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ([1, 2], "expected a JSON object with a question and an answer, found a list"),
        ({"answer": "1"}, "no question; expected one of the fields question, problem, Question, prompt, input, found"),
        ({"question": "  ", "answer": "1"}, "the question in `question` is empty"),
        ({"question": 4, "answer": "1"}, "must be a text, found 4"),
        ({"question": "q", "text": "1"}, "no answer; expected one of the fields answer, solution"),
        ({"question": "q", "answer": ""}, "the answer in `answer` is empty"),
        ({"question": "q", "answer": "sum\n####"}, "the answer in `answer` is empty"),
        ({"question": "q", "answer": True}, "must be a text, a number or a list of these, found True"),
        ({"question": "q", "answer": float("nan")}, "must be a text, a number or a list of these, found nan"),
        ({"question": "q", "answer": []}, "must be a text, a number or a list of these, found a list"),
        ({"question": "q", "solution": "it is 4"}, "the solution has no"),
        ({"id": 1.5, "question": "q", "answer": "1"}, "`id` must be a text or a whole number"),
        ({"id": "", "question": "q", "answer": "1"}, "`id` must be a text or a whole number"),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user"}], "answer": "1"},
            "must be a text, found null",
        ),
        ({"prompt": [{"role": "system", "content": "s"}], "answer": "1"}, "one message of the user"),
        ({"prompt": [{"role": "user", "content": "q"}] * 2, "answer": "1"}, "one message of the user"),
        ({"prompt": [{"role": "assistant", "content": ""}], "answer": "1"}, "one message of the user"),
        ({"prompt": ["q", {"role": "assistant", "content": ""}], "answer": "1"}, "one message of the user"),
        (
            {"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}], "answer": "1"},
            "an empty assistant message after it, found ['user', 'assistant']",
        ),
        ({"prompt": [], "answer": "1"}, "one message of the user"),
        (verl_row("x", ""), "the answer in `reward_model.ground_truth` is empty"),
    ],
)
def test_a_malformed_row_is_named_with_what_was_expected(tmp_path, row, expected):
    path = write_jsonl(tmp_path / "bad.jsonl", {"question": "fine", "answer": "1"}, row)
    with pytest.raises(UserError, match=r"bad\.jsonl, row 2: ") as raised:
        load_problems([path])
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_malformed_parquet_row_is_named(tmp_path):
    path = write_parquet(tmp_path / "bad.parquet", verl_row("a"), verl_row("b", ""))
    with pytest.raises(UserError, match=r"bad\.parquet, row 2: the answer in `reward_model\.ground_truth` is empty"):
        load_problems([path])


def test_files_that_cannot_be_read(tmp_path):
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read as parquet"):
        load_problems([str(broken)])
    with pytest.raises(UserError, match=r"gone\.jsonl is no file"):
        load_problems([str(tmp_path / "gone.jsonl")])
    with pytest.raises(UserError, match=r"neither a \.jsonl nor a \.parquet"):
        load_problems([str(tmp_path / "table.csv")])
    with pytest.raises(UserError, match="No problems found in"):
        load_problems([write_jsonl(tmp_path / "empty.jsonl", b"")])
    with pytest.raises(UserError, match="an empty list of sources"):
        load_problems([])


def test_two_problems_with_one_id_are_refused_naming_both(tmp_path):
    first = write_jsonl(tmp_path / "one.jsonl", {"id": "a", "question": "q", "answer": "1"})
    second = write_jsonl(
        tmp_path / "two.jsonl", {"id": "b", "question": "q", "answer": "1"}, {"id": "a", "question": "r", "answer": "2"}
    )
    with pytest.raises(UserError, match=r"two\.jsonl, row 2 has the problem id 'a' that .*one\.jsonl, row 1 has too"):
        load_problems([first, second])


def test_a_generated_task_is_a_source(tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", {"question": "q", "answer": "1"})
    generated = partial(arithmetic_problems, "validation", "shared", seed=3)
    problems = load_problems([path, "arithmetic"], 9, {"arithmetic": generated})
    assert problems[1:] == arithmetic_problems("validation", "shared", 8, seed=3)
    assert [problem.dataset for problem in problems] == ["one"] + ["arithmetic"] * 8
    assert len(load_problems(["arithmetic"], tasks={"arithmetic": generated})) == 200
