"""Contents of the page of a run, as JSON values: curves, settings, the list of mistakes, and the responses of each
problem in parts that the page unpacks when they are opened."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from meds_megatron.report.mistakes import Mistake, ProblemMistakes, find_mistakes
from meds_megatron.report.responses import VALUES, RunResponses, read_responses, texts
from meds_megatron.run.reader import SavedRun

PART_BYTES = 2**20
"""Text of the responses in one part of the page, about."""
TIMELINE_BINS = 24
TOP_ANSWERS = 6


@dataclass(frozen=True)
class RunContents:
    overview: dict
    """Name, settings and curves: what the page shows first."""
    mistakes: dict
    """Columns of the problems that were answered wrongly and of their mistakes."""
    parts: list[list[dict]]
    """Responses of the problems, many problems a part."""


def run_contents(run: SavedRun, text_bytes: int) -> RunContents:
    """`text_bytes` limits the texts of responses: the most typical of every mistake come first, and of those the ones
    of the most frequent mistakes."""
    responses = read_responses(run.rollouts)
    found = list(find_mistakes(responses.wrong, run.memory))
    chosen = chosen_texts(found, responses.wrong.bytes_W, text_bytes)
    text_of = texts(run.rollouts, responses.wrong, chosen)
    of_problems = [_problem(problem, responses, text_of) for problem in found]
    sizes = [int(sum(responses.wrong.bytes_W[row] for row in _rows(problem) if row in text_of)) for problem in found]
    parts = list(_in_parts(of_problems, sizes))
    return RunContents(_overview(run, responses, len(text_of)), _mistakes(found, responses, parts), parts)


def chosen_texts(found: list[ProblemMistakes], bytes_W: np.ndarray, text_bytes: int) -> set[int]:
    """Wrong responses whose texts the page shows."""
    mistakes = sorted((mistake for problem in found for mistake in problem.mistakes), key=lambda one: -len(one.rows))
    if not mistakes:
        return set()
    rows_W = np.concatenate([mistake.rows for mistake in mistakes])
    ranks_W = np.concatenate([np.arange(len(mistake.rows)) for mistake in mistakes])
    rows_W = rows_W[np.argsort(ranks_W, kind="stable")]
    return set(rows_W[np.cumsum(bytes_W[rows_W]) <= text_bytes].tolist())


def _overview(run: SavedRun, responses: RunResponses, texts_shown: int) -> dict:
    names = sorted({name for line in run.metrics for name in line} - {"step"})
    return {
        "name": run.name,
        "path": str(run.path),
        "steps": [line["step"] for line in run.metrics],
        "metrics": {name: [_number(line.get(name)) for line in run.metrics] for name in names},
        "settings": run.settings,
        "responses": int(responses.counts_G4[:, 2].sum()),
        "wrong": len(responses.wrong.problem_W),
        "texts": texts_shown,
        "rollouts": len(run.rollouts),
    }


def _mistakes(found: list[ProblemMistakes], responses: RunResponses, parts: list[list[dict]]) -> dict:
    """Columns of the problems and of the mistakes, the most frequent mistakes first."""
    counts_P2 = np.zeros((len(responses.problems), 2), dtype=np.int64)
    np.add.at(counts_P2, responses.counts_G4[:, 0], responses.counts_G4[:, 2:])
    places = [(part, place) for part, problems in enumerate(parts) for place in range(len(problems))]
    problems = [
        {
            **asdict(responses.problems[one.problem]),
            "responses": int(counts_P2[one.problem, 0]),
            "right": int(counts_P2[one.problem, 1]),
            "part": part,
            "place": place,
        }
        for one, (part, place) in zip(found, places, strict=True)
    ]
    last_step = int(responses.counts_G4[:, 1].max(initial=1))
    mistakes = [
        {"problem": number, "mistake": place, **_mistake(mistake, responses, last_step)}
        for number, problem in enumerate(found)
        for place, mistake in enumerate(problem.mistakes)
    ]
    mistakes.sort(key=lambda mistake: -mistake["times"])
    return {"problems": _columns(problems), "mistakes": _columns(mistakes), "last_step": last_step}


def _mistake(mistake: Mistake, responses: RunResponses, last_step: int) -> dict:
    wrong = responses.wrong
    steps = wrong.step_W[mistake.rows]
    answers = Counter(wrong.answers_W[row] for row in mistake.rows)
    penalties = wrong.values["penalty"][mistake.rows][steps == steps.max()]
    bins = np.minimum((steps - 1) * TIMELINE_BINS // max(last_step, 1), TIMELINE_BINS - 1)
    return {
        "name": mistake.name,
        "times": len(mistake.rows),
        "steps": len(np.unique(steps)),
        "first": int(steps.min()),
        "last": int(steps.max()),
        "penalty": _number(np.nanmean(penalties)) if np.isfinite(penalties).any() else None,
        "answers": [[answer, times] for answer, times in answers.most_common(TOP_ANSWERS)],
        "different": len(answers),
        "timeline": np.bincount(np.maximum(bins, 0), minlength=TIMELINE_BINS).tolist(),
    }


def _problem(problem: ProblemMistakes, responses: RunResponses, text_of: dict[int, str]) -> dict:
    """All wrong responses of one problem, column by column, in the order of its mistakes."""
    wrong, rows = responses.wrong, _rows(problem)
    begin, end = np.searchsorted(responses.counts_G4[:, 0], [problem.problem, problem.problem + 1])
    counts_G4 = responses.counts_G4[begin:end]
    return {
        "mistakes": [[mistake.name, len(mistake.rows)] for mistake in problem.mistakes],
        "variance": list(map(_number, problem.variance)),
        "steps": counts_G4[:, 1].tolist(),
        "graded": counts_G4[:, 2].tolist(),
        "right": counts_G4[:, 3].tolist(),
        "x": list(map(_number, problem.positions_N2[:, 0])),
        "y": list(map(_number, problem.positions_N2[:, 1])),
        "step": wrong.step_W[rows].tolist(),
        "row": wrong.row_W[rows].tolist(),
        "answer": [wrong.answers_W[row] for row in rows],
        "text": [text_of.get(row) for row in rows.tolist()],
        **{name: list(map(_number, wrong.values[name][rows])) for name in VALUES},
    }


def _rows(problem: ProblemMistakes) -> np.ndarray:
    return np.concatenate([mistake.rows for mistake in problem.mistakes])


def _in_parts(problems: list[dict], sizes: list[int]) -> Iterator[list[dict]]:
    part, size = [], 0
    for problem, text_bytes in zip(problems, sizes, strict=True):
        part.append(problem)
        # A response without its text takes about 100 bytes.
        size += text_bytes + 100 * len(problem["step"])
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _number(value: float | None) -> float | int | None:
    """Four significant digits, a whole number as it is; None for NaN and infinity, which JSON does not have."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")
