"""Problems: a question and its answer, with an identity that lasts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meds_megatron.data.rows import RowError, parse_row, read_rows
from meds_megatron.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One question.

    `id` is unique over the data set and the base of the memory's key; `source` is the file's stem or the kind of
    problem.
    """

    id: str
    question: str
    answer: str
    source: str


def load_problems(
    sources: Sequence[str],
    limit: int | None = None,
    *,
    split: Literal["train", "validation"] = "train",
    arithmetic_rules: Literal["shared", "per_kind"] = "shared",
    seed: int = 0,
) -> list[Problem]:
    """The problems of all sources in order, the first `limit` of them.

    A source is a jsonl or parquet file, or `arithmetic`: the embedded task, which `split`, `arithmetic_rules` and
    `seed` shape. A problem keeps the data set's own id; one that is a mere number, and the row number that stands in
    for a missing one, get the file's stem in front. Raises UserError naming file and row for whatever cannot be read,
    and for two problems with one id.
    """
    problems: list[Problem] = []
    origins: dict[str, str] = {}
    for source in sources:
        left = None if limit is None else limit - len(problems)
        if left == 0:
            break
        if source == "arithmetic":
            from meds_megatron.embedded.arithmetic import arithmetic_problems

            found = [(p, "arithmetic") for p in arithmetic_problems(split, arithmetic_rules, left, seed)]
        else:
            found = _from_file(Path(source).expanduser(), left)
        for problem, origin in found:
            if problem.id in origins:
                raise UserError(
                    f"{origin} has the problem id {problem.id!r} that {origins[problem.id]} has too, but ids must be "
                    "unique because mistakes are remembered by them: drop the repeated problem, or give it its own id"
                )
            origins[problem.id] = origin
            problems.append(problem)
    if not problems:
        named = ", ".join(sources) or "an empty list of sources"
        raise UserError(f"No problems found in {named}: name a jsonl or parquet file that holds some")
    return problems


def _from_file(path: Path, limit: int | None) -> list[tuple[Problem, str]]:
    """The file's first `limit` problems, each with the words that tell where it stands."""
    found = []
    for number, row in _numbered(path, limit):
        origin = f"{path}, row {number}"
        try:
            own_id, question, answer = parse_row(row)
        except RowError as error:
            raise UserError(f"{origin}: {error}") from None
        identity = (
            f"{path.stem}:{number}" if own_id is None else f"{path.stem}:{own_id}" if own_id.isdecimal() else own_id
        )
        found.append((Problem(identity, question, answer, path.stem), origin))
    return found


def _numbered(path: Path, limit: int | None) -> Iterator[tuple[int, object]]:
    for count, numbered in enumerate(read_rows(path)):
        if count == limit:
            return
        yield numbered
