"""Evaluated problems: their rows in LIMO's JSONL format, and their grading."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meds_megatron.data.rows import RowError, answer_text, read_rows
from meds_megatron.errors import UserError
from meds_megatron.reward.grading import Grade, GraderPool

HEADER = "settings"
"""Key of the first row of an output, which holds the settings instead of a problem."""


@dataclass
class Grading:
    """Verdicts of one grader on a problem's responses."""

    answers: list[str]
    """The answer in each response, "" where there is none."""
    correct: list[bool | None]
    """None where the grading failed."""

    @property
    def graded(self) -> list[float]:
        """1 for a right response, 0 for a wrong one, of those whose grading did not fail."""
        return [float(right) for right in self.correct if right is not None]

    @property
    def errors(self) -> int:
        """Responses whose grading failed."""
        return self.correct.count(None)


@dataclass
class Record:
    """A problem with its responses."""

    gold: str
    responses: list[str]
    fields: dict[str, Any] = field(default_factory=dict)
    """Other fields of the row, which stay as they are: `id`, `question`, lengths."""
    gradings: dict[str, Grading] = field(default_factory=dict)
    """Gradings by grader."""

    def to_row(self) -> dict[str, Any]:
        """The row in LIMO's fields, with the verdicts of the first grader. `is_correct` is whether any response is
        right; those of further graders are in `graders`."""
        first, *others = self.gradings.items()
        row = self.fields | {"generated_responses": self.responses, "gold_answer": self.gold} | _verdicts(first[1])
        return row | ({"graders": {name: _verdicts(grading) for name, grading in others}} if others else {})

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Record":
        """The problem of a row, with its verdicts left out. Raises RowError for a row without responses or gold
        answer."""
        responses = row.get("generated_responses")
        if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
            raise RowError("`generated_responses` must be a list of texts: save the responses there")
        if row.get("gold_answer") is None:
            raise RowError("no `gold_answer`: add the answer that the responses are compared with")
        left_out = {"generated_responses", "gold_answer", "graders", *_verdicts(Grading([], []))}
        others = {name: value for name, value in row.items() if name not in left_out}
        return cls(answer_text("gold_answer", row["gold_answer"]), responses, others)

    @classmethod
    def from_output(cls, row: dict[str, Any], graders: Sequence[str]) -> "Record":
        """The problem of a row of `to_row`, with the verdicts of `graders`, the first of which was the first there."""
        record = cls.from_row(row)
        rows = {graders[0]: row} | row.get("graders", {})
        for name in graders:
            record.gradings[name] = Grading(rows[name]["generated_answers"], rows[name]["answers_correctness"])
        return record


def _verdicts(grading: Grading) -> dict[str, Any]:
    return {
        "generated_answers": grading.answers,
        "is_correct": any(grading.correct),
        "answers_correctness": grading.correct,
    }


def read_records(path: Path) -> list[Record]:
    """The problems of an output, or of any jsonl or parquet file, with their responses. Raises UserError with file and
    row for what cannot be read."""
    records = []
    for number, row in read_rows(path):
        if isinstance(row, dict) and HEADER in row and "generated_responses" not in row:
            continue
        try:
            if not isinstance(row, dict):
                raise RowError("expected an object with `generated_responses` and `gold_answer`")
            records.append(Record.from_row(row))
        except RowError as error:
            raise UserError(f"{path}, row {number}: {error}") from None
    if not records:
        raise UserError(f"{path} has no rows with responses: name a file that `meds eval` wrote")
    return records


def grading_of(responses: Sequence[str], grades: Sequence[Grade], pool: GraderPool) -> Grading:
    """Verdicts on the responses to one problem as a Grading."""
    answers = [pool.rules.extract(response) or "" for response in responses]
    return Grading(answers, [None if grade.failed else grade.correct for grade in grades])


def grade(records: Sequence[Record], pool: GraderPool) -> None:
    """Adds the verdicts of a pool's grader to the records."""
    pairs = [(response, record.gold) for record in records for response in record.responses]
    grades: Iterator[Grade] = iter(pool.grade([text for text, _ in pairs], [gold for _, gold in pairs]))
    for record in records:
        own = [next(grades) for _ in record.responses]
        record.gradings[pool.grader] = grading_of(record.responses, own, pool)
