"""Summaries of problems by source, level and length, and `meds data inspect`."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meds_megatron.data.duplicates import same_words
from meds_megatron.data.rows import RowError, parse_row, read_rows
from meds_megatron.errors import UserError

MOST_BROKEN_ROWS = 20
LENGTHS = (100, 200, 400, 800, 1600)
"""Bounds of the groups of questions by characters."""
_WHOLE = re.compile(r"-?[\d,]+")
_NUMBER = re.compile(r"-?[\d.,]+|-?\\[dt]?frac\{?\d+\}?\{?\d+\}?|-?\d+/\d+")


@dataclass(frozen=True)
class Described:
    """Properties of a problem that a summary counts."""

    source: str
    level: str
    question: str
    answer: str


def summary(problems: Sequence[Described]) -> list[dict[str, Any]]:
    """A row for each source and level with the number of problems, and how many questions are below each of LENGTHS
    characters but not below the one before."""
    rows = []
    for source, level in sorted({(problem.source, problem.level) for problem in problems}):
        own = [problem for problem in problems if (problem.source, problem.level) == (source, level)]
        rows.append({"source": source, "level": level or "-", "problems": len(own)} | by_length(own))
    if len(rows) > 1:
        rows.append({"source": "all", "level": "", "problems": len(problems)} | by_length(problems))
    return rows


def by_length(problems: Iterable[Described]) -> dict[str, int]:
    """Number of questions in each group of length."""
    lengths = [len(problem.question) for problem in problems]
    counts, last = {}, 0
    for bound in LENGTHS:
        counts[f"<{bound}"] = sum(last <= length < bound for length in lengths)
        last = bound
    return counts | {f">={last}": sum(length >= last for length in lengths)}


def answer_kind(answer: str) -> str:
    """`whole number`, `number`, or `other`."""
    if _WHOLE.fullmatch(answer):
        return "whole number"
    return "number" if _NUMBER.fullmatch(answer) else "other"


def inspect(path: Path) -> dict[str, Any]:
    """Counts of a file of problems: `rows`, `problems`, `repeated` (questions in the same words as an earlier one),
    `answers` by kind, `summary`, `broken` (file, row and reason of the first MOST_BROKEN_ROWS) and `broken_rows`.

    A file of which no row can be read raises UserError.
    """
    problems, broken, rows = [], [], 0
    for number, row in read_rows(path):
        rows += 1
        try:
            _, question, answer = parse_row(row)
        except RowError as error:
            broken.append(f"{path}, row {number}: {error}")
            continue
        source = next((row[name] for name in ("source", "data_source") if isinstance(row.get(name), str)), path.stem)
        level = row.get("level")
        problems.append(Described(source, "" if level is None else str(level), question, answer))
    if not problems:
        raise UserError(broken[0] if broken else f"{path} has no rows: name a file with problems")
    words = {same_words(problem.question) for problem in problems}
    return {
        "rows": rows,
        "problems": len(problems),
        "repeated": len(problems) - len(words),
        "answers": dict(Counter(answer_kind(problem.answer) for problem in problems)),
        "summary": summary(problems),
        "broken": broken[:MOST_BROKEN_ROWS],
        "broken_rows": len(broken),
    }
