"""`meds data unify`: the published training set, DAPO-Math-17K and levels 3 to 5 of MATH without duplicates, as one
parquet file."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from meds_megatron import atomic
from meds_megatron.config import DataConfig
from meds_megatron.data.duplicates import NearIndex, same_words
from meds_megatron.data.problems import load_problems
from meds_megatron.data.rows import RowError, parse_row, read_rows
from meds_megatron.errors import UserError

DAPO_OPENING = "Solve the following math problem step by step."
DAPO_CLOSING = "Remember to put your answer on its own line"
"""First and last paragraph of DAPO-Math-17K's prompts, which ask for another form of answer than a box."""


@dataclass(frozen=True)
class TrainingProblem:
    """A row of the training set."""

    id: str
    """Source and digest of the question: the same in whatever file and order."""
    source: str
    """`dapo` or `math`."""
    question: str
    answer: str
    level: int | None = None
    """1 to 5 in MATH."""
    subject: str | None = None


@dataclass
class Unified:
    """The training set, and what was left out of it."""

    problems: list[TrainingProblem]
    rows: Counter[str] = field(default_factory=Counter)
    """Rows read, by source."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Problems left out, by reason."""
    contaminated: list[dict[str, str]] = field(default_factory=list)
    """Problems of evaluation sets that are in the training set: `id`, `question`, `evaluation` (file and id) and `how`
    (exact or near)."""


def unify(
    dapo: Sequence[str],
    math: Sequence[str],
    levels: Sequence[int] = (3, 4, 5),
    evaluation: Sequence[str] = (),
    remove_contaminated: bool = False,
) -> Unified:
    """The problems of all files, those of DAPO first, each once.

    Of problems in the same words the first is kept, of those in nearly the same words with the same numbers and answer,
    too. Raises UserError with file and row for a row that cannot be read.
    """
    result = Unified([])
    seen: dict[str, TrainingProblem] = {}
    index = NearIndex()
    for problem in _read(dapo, math, result):
        words = same_words(problem.question)
        if problem.source == "math" and problem.level not in levels:
            result.dropped["another level"] += 1
        elif words in seen:
            same = _same_answer(problem, seen[words])
            result.dropped["the same words" if same else "the same words, another answer"] += 1
        elif any(_same_answer(problem, result.problems[number]) for number in index.matches(problem.question)):
            result.dropped["nearly the same words"] += 1
        else:
            seen[words] = problem
            result.problems.append(problem)
            index.add(problem.question)
    _find_contaminated(result, evaluation, seen, index)
    if remove_contaminated:
        found = {pair["id"] for pair in result.contaminated}
        result.dropped["in an evaluation set"] = len(found)
        result.problems = [problem for problem in result.problems if problem.id not in found]
    if not result.problems:
        raise UserError(f"no problems are left of {', '.join([*dapo, *math])}: check --dapo, --math and --levels")
    return result


def _same_answer(one: TrainingProblem, other: TrainingProblem) -> bool:
    return same_words(one.answer) == same_words(other.answer)


def _read(dapo: Sequence[str], math: Sequence[str], result: Unified) -> Iterator[TrainingProblem]:
    for source, files in (("dapo", dapo), ("math", math)):
        for name in files:
            path = Path(name).expanduser()
            for number, row in read_rows(path):
                try:
                    _, question, answer = parse_row(row)
                    level = _level(row)
                except RowError as error:
                    raise UserError(f"{path}, row {number}: {error}") from None
                result.rows[source] += 1
                question = without_instruction(question) if source == "dapo" else question.strip()
                digest = hashlib.blake2b(same_words(question).encode(), digest_size=8).hexdigest()
                subject = row.get("subject", row.get("type"))
                yield TrainingProblem(
                    f"{source}:{digest}", source, question, answer, level, subject if isinstance(subject, str) else None
                )


def _level(row: dict) -> int | None:
    """Level of a row: 3 and `Level 3` are 3, no level and `Level ?` are None."""
    value = row.get("level")
    if value is None or isinstance(value, int):
        return value
    text = str(value).removeprefix("Level").strip()
    if text == "?":
        return None
    if not text.isdecimal():
        raise RowError(f"`level` must be a number or a text such as 'Level 3', found {value!r}: correct or remove it")
    return int(text)


def without_instruction(question: str) -> str:
    """A question of DAPO-Math-17K without the paragraphs around it that ask for an `Answer:` line."""
    paragraphs = question.strip().split("\n\n")
    if len(paragraphs) > 1 and paragraphs[0].startswith(DAPO_OPENING):
        paragraphs = paragraphs[1:]
    if len(paragraphs) > 1 and paragraphs[-1].startswith(DAPO_CLOSING):
        paragraphs = paragraphs[:-1]
    return "\n\n".join(paragraphs).strip()


def _find_contaminated(
    result: Unified, evaluation: Sequence[str], seen: dict[str, TrainingProblem], index: NearIndex
) -> None:
    for name in evaluation:
        for problem in load_problems([name]):
            exact = seen.get(same_words(problem.question))
            near = [] if exact else [result.problems[number] for number in index.matches(problem.question)]
            for training, how in [(exact, "exact")] if exact else [(one, "near") for one in near]:
                place = f"{name}: {problem.id}"
                result.contaminated.append(
                    {"id": training.id, "question": training.question, "evaluation": place, "how": how}
                )


def write(result: Unified, out: Path) -> list[Path]:
    """Writes the training set, and next to it the contaminated problems if there are any; each file appears whole or
    not at all.

    Columns: `id`, `source`, `question`, `answer`, `level`, `subject`, and for trainers that take chat messages `prompt`
    (the template of Qwen-Math: its system message, and the question) and `reward_model.ground_truth`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    system = {"role": "system", "content": DataConfig.system_prompt}
    rows = [
        {
            "id": problem.id,
            "source": problem.source,
            "question": problem.question,
            "answer": problem.answer,
            "level": problem.level,
            "subject": problem.subject,
            "prompt": [system, {"role": "user", "content": problem.question}],
            "reward_model": {"ground_truth": problem.answer, "style": "rule"},
        }
        for problem in result.problems
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    text = pa.string()
    message = pa.struct([("role", text), ("content", text)])
    columns = [("id", text), ("source", text), ("question", text), ("answer", text)]
    columns += [("level", pa.int64()), ("subject", text), ("prompt", pa.list_(message))]
    columns += [("reward_model", pa.struct([("ground_truth", text), ("style", text)]))]
    with atomic.open_atomic(out, "wb") as file:
        parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), file)
    if not result.contaminated:
        return [out]
    listed = out.with_name(f"{out.stem}_contaminated.jsonl")
    atomic.write_text(listed, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in result.contaminated))
    return [out, listed]
