"""The mistakes of a run: the wrong responses of each problem, clustered as the error memory clusters them.

A rollout row has the label that its response had at its own step, and the memory renumbers its clusters in every step.
The report therefore clusters all fingerprints of a problem once, as the memory does by its settings, so that a mistake
is the same one from the first step to the last.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.memory.clustering import cluster
from meds_megatron.memory.features import features_of, unit_vectors
from meds_megatron.report.responses import WrongResponses
from meds_megatron.reward.answers import answer_class

NOISE, NO_ANSWER, NO_FINGERPRINT = "noise", "no answer", "no fingerprint"
"""Names of mistakes that are no clusters: HDBSCAN's noise; responses without a box; responses with one that did not go
through the model, mostly because the group filter dropped a prompt all of whose responses were wrong. Of the last, each
answer given twice or more, in any spelling, is a mistake, and all others are one together."""


@dataclass(frozen=True)
class Mistake:
    """Wrong responses to one problem that fall together."""

    name: str
    """`A`, `B`, ... for clusters, the largest first; else one of the names above."""
    rows: np.ndarray
    """int64; indices of its responses, the most typical first: the nearest to the mean of the fingerprints, or, where
    answers are what they have in common, the oldest."""


@dataclass(frozen=True)
class ProblemMistakes:
    problem: int
    mistakes: list[Mistake]
    """The most frequent first."""
    positions_N2: np.ndarray
    """float64; first two principal components of the unit vectors that are clustered, of all responses in the order of
    the mistakes; NaN without a fingerprint."""
    variance: tuple[float, float]
    """Share of the vectors' variance along each of the two."""


def find_mistakes(wrong: WrongResponses, config: MemoryConfig) -> Iterator[ProblemMistakes]:
    """The mistakes of every problem with a wrong response, in the order of the problems."""
    order_W = np.argsort(wrong.problem_W, kind="stable")
    problems, starts, sizes = np.unique(wrong.problem_W[order_W], return_index=True, return_counts=True)
    for problem, start, size in zip(problems.tolist(), starts, sizes, strict=True):
        yield _mistakes_of(problem, order_W[start : start + size], wrong, config)


def _mistakes_of(problem: int, rows: np.ndarray, wrong: WrongResponses, config: MemoryConfig) -> ProblemMistakes:
    has_fingerprint_N = np.isfinite(wrong.fingerprints_WL[rows]).all(axis=1) & (wrong.fingerprints_WL.shape[1] > 0)
    placed = rows[has_fingerprint_N]
    # The places on the map are those of fingerprints also where the memory clusters answers.
    layers = replace(config, method="hdbscan") if config.method == "answer" else config
    units_NF = unit_vectors(features_of(wrong.fingerprints_WL[placed], layers))
    positions, variance = dict.fromkeys(rows.tolist(), (np.nan, np.nan)), (0.0, 0.0)
    if len(placed):
        positions_N2, variance = principal_components(units_NF)
        positions |= zip(placed.tolist(), positions_N2.tolist(), strict=True)
    if config.method == "answer":
        mistakes = _clusters_of_answers(rows.tolist(), wrong.answers_W)
    else:
        mistakes = _by_answer(rows[~has_fingerprint_N].tolist(), wrong.answers_W)
        if len(placed):
            labels_N = cluster(units_NF, np.empty((0, 2), np.int32), config).labels_N
            mistakes += _clusters(placed, units_NF, labels_N)
    mistakes.sort(key=lambda mistake: (-len(mistake.rows), mistake.name))
    in_order = [positions[row] for mistake in mistakes for row in mistake.rows.tolist()]
    return ProblemMistakes(problem, mistakes, np.array(in_order).reshape(-1, 2), variance)


def _clusters_of_answers(rows: list[int], answers_W: list[str | None]) -> list[Mistake]:
    """The clusters of `memory.method: answer`, which needs no fingerprints."""
    groups = defaultdict(list)
    for row in rows:
        groups[_class_of(answers_W[row])].append(row)
    without = groups.pop(None, [])
    largest_first = sorted(groups.values(), key=len, reverse=True)
    mistakes = [Mistake(letters(number), np.array(members)) for number, members in enumerate(largest_first)]
    return [*mistakes, *([Mistake(NO_ANSWER, np.array(without))] if without else [])]


def _clusters(rows: np.ndarray, units_NF: np.ndarray, labels_N: np.ndarray) -> list[Mistake]:
    sizes = Counter(labels_N.tolist())
    labels = sorted(sizes, key=lambda label: (label < 0, -sizes[label], label))
    return [
        Mistake(
            NOISE if label < 0 else letters(number),
            rows[labels_N == label][_by_distance_to_mean(units_NF[labels_N == label])],
        )
        for number, label in enumerate(labels)
    ]


def letters(number: int) -> str:
    """A, B, ..., Z, AA, AB, ... for 0, 1, ..."""
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name


def _by_distance_to_mean(units_NF: np.ndarray) -> np.ndarray:
    # Rounded, so that equal vectors stay in the order of their steps.
    return np.argsort(np.linalg.norm(units_NF - units_NF.mean(axis=0), axis=1).round(9), kind="stable")


def _by_answer(rows: list[int], answers_W: list[str | None]) -> list[Mistake]:
    times = Counter(_class_of(answers_W[row]) for row in rows)
    groups = defaultdict(list)
    for row in rows:
        answer = _class_of(answers_W[row])
        groups[(NO_ANSWER,) if answer is None else (NO_FINGERPRINT, answer if times[answer] > 1 else None)].append(row)
    return [Mistake(name, np.array(members)) for (name, *_), members in groups.items()]


@cache
def _class_of(answer: str | None) -> str | None:
    return None if answer is None else answer_class(answer)


def principal_components(vectors_NF: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Coordinates [N, 2] along the first two principal components, and the shares of the variance along them; zeros
    where vectors have no such component."""
    centred_NF = vectors_NF - vectors_NF.mean(axis=0)
    _, lengths, directions_KF = np.linalg.svd(centred_NF, full_matrices=False)
    # The sign of a singular vector is arbitrary: its largest component is made positive.
    largest_K = np.argmax(np.abs(directions_KF), axis=1)
    directions_KF *= np.sign(directions_KF[np.arange(len(directions_KF)), largest_K])[:, None]
    positions_N2 = np.zeros((len(vectors_NF), 2))
    shares = [0.0, 0.0]
    total = float((lengths**2).sum())
    for axis in range(min(2, len(lengths)) if total > 1e-18 * len(vectors_NF) else 0):
        positions_N2[:, axis] = centred_NF @ directions_KF[axis]
        shares[axis] = float(lengths[axis] ** 2) / total
    return positions_N2, (shares[0], shares[1])
