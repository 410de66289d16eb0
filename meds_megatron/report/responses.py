"""The wrong responses of a run and how often each problem was answered, from its rollout files.

Texts are left in the files until it is known which of them the report shows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from meds_megatron.errors import UserError
from meds_megatron.latex import last_boxed
from meds_megatron.run.rollout_files import numbers_of, read_columns, texts_of, vectors_of

VALUES = ["response_tokens", "score", "penalty", "cluster_size", "advantage", "policy_version"]
"""Columns of numbers that are shown as they are."""
COLUMNS = ["key", "source", "prompt", "answer", "response", "correct", "outcome", "fingerprint", *VALUES]
FAILED_GRADINGS = ("timeout", "error")


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    """The expected answer."""
    source: str
    """Data set, or kind of problem."""


@dataclass
class WrongResponses:
    """W wrong responses in the order of their steps."""

    problem_W: np.ndarray
    """int64; index into `RunResponses.problems`."""
    file_W: np.ndarray
    row_W: np.ndarray
    """int64; the response is row `row_W[i]` of rollout file `file_W[i]`."""
    step_W: np.ndarray
    answers_W: list[str | None]
    """Content of the response's last box; None without one."""
    bytes_W: np.ndarray
    """int64; size of the text in UTF-8."""
    values: dict[str, np.ndarray]
    """float64 [W] for each of VALUES, NaN where the response has none."""
    fingerprints_WL: np.ndarray
    """float32; NaN in rows without a fingerprint."""


@dataclass
class RunResponses:
    problems: list[Problem]
    counts_G4: np.ndarray
    """int64; problem, step, graded responses and right ones, a row for each step in which a problem was answered; by
    problem, then by step."""
    wrong: WrongResponses


def read_responses(rollouts: list[Path]) -> RunResponses:
    """All wrong responses of the files; those whose grading failed are neither right nor wrong and left out.

    Raises UserError for a damaged file.
    """
    problems: dict[str, tuple[int, Problem]] = {}
    counts, parts = [np.empty((0, 4), np.int64)], []
    for number, path in enumerate(rollouts):
        step = int(path.stem.removeprefix("step_"))
        table = read_columns(path, COLUMNS)
        problem_B = _problems_of(table, problems)
        graded_B = ~np.isin(np.array(table["outcome"].to_pylist(), dtype=object), FAILED_GRADINGS)
        correct_B = table["correct"].to_numpy(zero_copy_only=False).astype(bool)
        counts.append(_counts(problem_B, step, graded_B, correct_B))
        rows = np.flatnonzero(graded_B & ~correct_B)
        parts.append(_wrong_responses(table.take(pa.array(rows)), rows, problem_B[rows], number, step))
    counts_G4 = np.concatenate(counts)
    counts_G4 = counts_G4[np.argsort(counts_G4[:, 0], kind="stable")]
    return RunResponses([problem for _, problem in problems.values()], counts_G4, _joined(parts))


def texts(rollouts: list[Path], wrong: WrongResponses, chosen: Iterable[int]) -> dict[int, str]:
    """Text of the chosen wrong responses, by their index."""
    chosen_C = np.fromiter(chosen, dtype=np.int64)
    found: dict[int, str] = {}
    for number in np.unique(wrong.file_W[chosen_C]):
        of_file = chosen_C[wrong.file_W[chosen_C] == number]
        column = read_columns(rollouts[number], ["response"])["response"]
        found |= zip(of_file.tolist(), texts_of(column.take(pa.array(wrong.row_W[of_file]))), strict=True)
    return found


def _problems_of(table: pa.Table, problems: dict[str, tuple[int, Problem]]) -> np.ndarray:
    """Index of each response's problem, int64 [B]; new ones are added to `problems`, by the id in their key."""
    indices = []
    for key, question, answer, source in zip(
        *(texts_of(table[name]) for name in ("key", "prompt", "answer", "source")), strict=True
    ):
        identity = key.rpartition("|")[0]
        if identity not in problems:
            problems[identity] = (len(problems), Problem(question, answer, source))
        indices.append(problems[identity][0])
    return np.array(indices, dtype=np.int64)


def _counts(problem_B: np.ndarray, step: int, graded_B: np.ndarray, correct_B: np.ndarray) -> np.ndarray:
    """Rows of `RunResponses.counts_G4` of one step."""
    problem_G, group_B = np.unique(problem_B, return_inverse=True)
    graded_G = np.bincount(group_B, graded_B, len(problem_G))
    right_G = np.bincount(group_B, graded_B & correct_B, len(problem_G))
    return np.stack([problem_G, np.full(len(problem_G), step), graded_G, right_G], axis=1).astype(np.int64)


def _wrong_responses(table: pa.Table, rows: np.ndarray, problem_W: np.ndarray, file: int, step: int) -> WrongResponses:
    responses = texts_of(table["response"])
    return WrongResponses(
        problem_W=problem_W,
        file_W=np.full(len(rows), file, dtype=np.int64),
        row_W=rows,
        step_W=np.full(len(rows), step, dtype=np.int64),
        answers_W=[last_boxed(response) for response in responses],
        bytes_W=np.array([len(response.encode()) for response in responses], dtype=np.int64),
        values={name: numbers_of(table[name]) for name in VALUES},
        fingerprints_WL=vectors_of(table["fingerprint"]),
    )


def _joined(parts: list[WrongResponses]) -> WrongResponses:
    layers = {part.fingerprints_WL.shape[1] for part in parts} - {0}
    if len(layers) > 1:
        raise UserError(f"The rollout files have fingerprints of {sorted(layers)} layers: they are of several models.")
    for part in parts:
        if part.fingerprints_WL.shape[1] == 0:
            part.fingerprints_WL = np.full((len(part.problem_W), max(layers, default=0)), np.nan, dtype=np.float32)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts]) if parts else np.empty(0, np.int64)

    return WrongResponses(
        problem_W=joined("problem_W"),
        file_W=joined("file_W"),
        row_W=joined("row_W"),
        step_W=joined("step_W"),
        answers_W=[answer for part in parts for answer in part.answers_W],
        bytes_W=joined("bytes_W"),
        values={name: np.concatenate([part.values[name] for part in parts]) for name in VALUES} if parts else {},
        fingerprints_WL=joined("fingerprints_WL") if parts else np.empty((0, 0), np.float32),
    )
