r"""Rows of jsonl and parquet files, and the question, answer and id in each.

Known layouts: GSM8K (`question`, `answer` ending in `#### 18`), MATH500, AIME and AMC (`problem`, `answer`), verl and
DAPO-Math-17K (`prompt` as chat messages, `reward_model.ground_truth`, `extra_info.index`), and rows with one of
`question`, `problem`, `Question`, `prompt`, `input` and one of `answer`, `solution`, where a solution has its answer in
a `\boxed{}`. An answer may be a text, a number (27.0 is 27) or a list of these, all of which are required.

Chat messages may be [user], [system, user], or either followed by an empty assistant message, as in the published MEDS
parquet files. Only the user's message is kept. The system message of a prompt is `data.system_prompt`, also where a row
has one of its own. An empty assistant message is not rendered: a chat template applied to such a row's own messages
would put an empty assistant turn before the generation prompt.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json
from meds_megatron.latex import last_boxed

QUESTION_FIELDS = ("question", "problem", "Question", "prompt", "input")
ID_FIELDS = ("id", "unique_id")
PARQUET_BATCH = 1024


class RowError(ValueError):
    """A malformed row; the caller adds file and row number to the message."""


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, row) of each row, counted from 1. Blank lines of a jsonl file are counted, but not returned."""
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise UserError(f"{path} is neither a .jsonl nor a .parquet file: convert it, or correct the name")
    if not path.is_file():
        raise UserError(f"{path} is no file: correct the path of the data set (relative paths start at {Path.cwd()})")
    return readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, row {number}: not valid JSON ({error}); expected one JSON object: correct or remove it"
                ) from None
            yield number, row


def _read_parquet(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(PARQUET_BATCH):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} cannot be read as parquet after row {number} ({error}): download or write the file again"
        ) from None


def parse_row(row: object) -> tuple[str | None, str, str]:
    """(id or None, question, answer) of a row in any known layout; RowError for a missing or malformed field."""
    if not isinstance(row, dict):
        raise RowError(
            f"expected a JSON object with a question and an answer, found {_kind(row)}: correct or remove the row"
        )
    parsed = _id(row), _question(row), _answer(row)
    for field, text in zip(("id", "question", "answer"), parsed, strict=True):
        if text is None:
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"the {field} holds {text[error.start]!r}, half of a character: write the file again as UTF-8"
            ) from None
    return parsed


def _id(row: dict) -> str | None:
    extra = row.get("extra_info")
    candidates = [(field, row.get(field)) for field in ID_FIELDS]
    candidates.append(("extra_info.index", extra.get("index") if isinstance(extra, dict) else None))
    for field, value in candidates:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise RowError(
                f"`{field}` must be a text or a whole number, found {_kind(value)}: give the row an id or none"
            )
        return str(value)
    return None


def _question(row: dict) -> str:
    field = next((field for field in QUESTION_FIELDS if row.get(field) is not None), None)
    if field is None:
        raise RowError(
            f"no question; expected one of the fields {', '.join(QUESTION_FIELDS)}, found {', '.join(row) or 'none'}"
        )
    value = row[field]
    if isinstance(value, list):
        value = _user_message(field, value)
    if not isinstance(value, str):
        raise RowError(f"the question in `{field}` must be a text, found {_kind(value)}: correct or remove the row")
    if not value.strip():
        raise RowError(f"the question in `{field}` is empty: fill it in or remove the row")
    return value


def _user_message(field: str, messages: list) -> object:
    """The content of the user's message; see the module's docstring for the other messages that may come with it."""
    roles = [message.get("role") if isinstance(message, dict) else _kind(message) for message in messages]
    if roles[-1:] == ["assistant"] and not messages[-1].get("content"):
        roles = roles[:-1]
    if roles not in (["user"], ["system", "user"]):
        raise RowError(
            f"`{field}` must be one message of the user, with at most a system message before it and an empty "
            f"assistant message after it, found {roles}: keep these, and set data.system_prompt for a system message"
        )
    return messages[len(roles) - 1].get("content")


def _answer(row: dict) -> str:
    if isinstance(row.get("reward_model"), dict):
        field, value = "reward_model.ground_truth", row["reward_model"].get("ground_truth")
    elif row.get("answer") is not None:
        field, value = "answer", row["answer"]
    elif row.get("solution") is not None:
        field, value = "solution", row["solution"]
    else:
        raise RowError(f"no answer; expected one of the fields answer, solution, reward_model, found {', '.join(row)}")
    answer = answer_text(field, value)
    if not answer:
        raise RowError(f"the answer in `{field}` is empty: fill it in or remove the row")
    return answer


def answer_text(field: str, value: object) -> str:
    """The answer in the value of a field, without its solution; RowError for what is no answer."""
    if isinstance(value, list) and value and not any(isinstance(part, list) for part in value):
        return ", ".join(answer_text(field, part) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str):
        raise RowError(
            f"the answer in `{field}` must be a text, a number or a list of these, found {_kind(value)}: correct or "
            "remove the row"
        )
    boxed = last_boxed(value)
    if boxed is not None:
        return boxed
    if field == "solution":
        raise RowError("the solution has no \\boxed{} with the answer: add one, or an `answer` field")
    return value.rpartition("####")[2].strip()


def _kind(value: object) -> str:
    if isinstance(value, bool | float | int):
        return repr(value)
    if isinstance(value, str):
        return "a text" if value else "an empty text"
    return {type(None): "null", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
