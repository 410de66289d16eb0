"""Problems: a question, its answer and an id that stays the same from run to run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from meds_megatron.data.rows import RowError, parse_row, read_rows
from meds_megatron.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One question.

    `id` is unique over all data sets of a run and is part of the memory's key; `source` is the stem of the file, or
    `task/kind` for a generated problem.
    """

    id: str
    question: str
    answer: str
    source: str

    @property
    def dataset(self) -> str:
        """Name that metrics of a data set have: the stem of the file, or the task."""
        return self.source.partition("/")[0]


def load_problems(
    sources: Sequence[str],
    limit: int | None = None,
    tasks: Mapping[str, Callable[[int | None], list[Problem]]] | None = None,
) -> list[Problem]:
    """The problems of all sources in order, the first `limit` of them.

    A source is a jsonl or parquet file, or one of `tasks`, each a function that generates the first `n` problems of a
    task (with None: its default number). A problem keeps the id it has in the data set; if
    that id is a number, or the row has none and its number is used, the stem of the file is put in front. Raises
    UserError with file and row for anything that cannot be read, and for two problems with the same id.
    """
    problems: dict[str, Problem] = {}
    origins: dict[str, str] = {}
    for source in sources:
        left = None if limit is None else limit - len(problems)
        if left == 0:
            break
        if tasks and source in tasks:
            found: Iterator[tuple[Problem, str]] = ((problem, source) for problem in tasks[source](left))
        else:
            found = islice(_from_file(Path(source).expanduser()), left)
        for problem, origin in found:
            if problem.id in problems:
                raise UserError(
                    f"{origin} has the problem id {problem.id!r} that {origins[problem.id]} has too, but ids must be "
                    "unique because mistakes are remembered by them: drop the repeated problem, or change its id"
                )
            problems[problem.id], origins[problem.id] = problem, origin
    if not problems:
        named = ", ".join(sources) or "an empty list of sources"
        raise UserError(f"No problems found in {named}: name a jsonl or parquet file with some")
    return list(problems.values())


def _from_file(path: Path) -> Iterator[tuple[Problem, str]]:
    """Each problem of the file with its origin for error messages, "FILE, row NUMBER"."""
    for number, row in read_rows(path):
        origin = f"{path}, row {number}"
        try:
            own_id, question, answer = parse_row(row)
        except RowError as error:
            raise UserError(f"{origin}: {error}") from None
        if own_id is None or own_id.isdecimal():
            own_id = f"{path.stem}:{own_id or number}"
        yield Problem(own_id, question, answer, path.stem), origin
