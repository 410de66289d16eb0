"""Measures of a finished run of the study (`study.py`).

Wrong responses are those that were graded and are not right. Null is a measure that nothing counts in:

- `pass@1`, `pass@n`: of the validation after the last step; n is 32, or the number of responses to a problem if fewer.
- `wrong_answers`: different wrong final answers in a prompt's group, mean over the groups of the last quarter of steps.
- `eigenvalue_ratio`: largest eigenvalue of the covariance of the fingerprints of wrong responses whose working follows
  a rule, over the sum of all, in the last quarter of steps.
- `ari_fingerprint`, `ari_answer`: adjusted Rand index between the rules that the workings show and the clusters of
  fingerprints (of the run's memory settings), or the final answers; mean over problems weighted by their responses.
  Wrong responses whose working follows no rule are left out. Only responses that had a forward pass have a
  fingerprint: those of all groups where no group is filtered out or the memory remembers filtered prompts, else those
  of groups with right and wrong ones. Methods that differ in this have these measures of different responses.
- `saturated`, `clusters`: share of the memory's lookups whose mistake had the largest penalty, mean over the second
  half of the steps, and the clusters of a key after the last step. Null without a memory.
- `minutes`, `responses`: time of all steps without validation, and responses drawn.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.metrics import adjusted_rand_score
from study_plan import measured_n

from meds_megatron.config import Config, MemoryConfig
from meds_megatron.latex import last_boxed
from meds_megatron.memory import MemoryShard
from meds_megatron.memory.statistics import Moments, top_eigenvalue_share
from meds_megatron.reward.answers import answer_class
from meds_megatron.run.reader import SavedRun
from meds_megatron.run.rollout_files import read_columns, texts_of, vectors_of
from meds_megatron.toy_tasks.arithmetic import rule_of


def measure(files: SavedRun) -> dict[str, float | None]:
    """The measures of a finished run; null for one that no response counts in."""
    last, config = files.metrics[-1], files.config
    trained = [line for line in files.metrics if line["step"] > 0]
    seconds = sum(line["time/step"] - line.get("time/validation", 0.0) for line in trained)
    measures: dict[str, float | None] = {
        "pass@1": last["validation/pass@1"],
        "pass@n": last[f"validation/pass@{measured_n(config.rollout.validation_responses)}"],
        "minutes": seconds / 60,
        "responses": sum(line["response/count"] for line in trained),
        "saturated": None,
        "clusters": None,
    }
    if last["memory/keys"] > 0:
        shares = [line["memory/saturated_share"] for line in trained[len(trained) // 2 :]]
        measures |= {"saturated": float(np.mean(shares)), "clusters": last["memory/clusters"] / last["memory/keys"]}
    first_late = 3 * len(files.rollouts) // 4
    late, agreement = WrongResponses(), WrongResponses()
    for number, path in enumerate(files.rollouts):
        responses = list(responses_of(path))
        agreement.add(responses, number)
        if number >= first_late:
            late.add(responses, number)
    return measures | late.diversity() | agreement.agreement(config)


def validations(files: SavedRun) -> dict[str, list[float]]:
    """`pass@1` and `pass@n` by step, of every validation."""
    n = measured_n(files.config.rollout.validation_responses)
    return {
        str(line["step"]): [round(line[f"validation/pass@{k}"], 5) for k in (1, n)]
        for line in files.metrics
        if "validation/pass@1" in line
    }


class Response(NamedTuple):
    """A row of a rollout file of a toy task."""

    key: str
    group: int
    text: str
    is_wrong: bool
    """Graded and not right."""
    rule: str | None
    """The rule that the working follows, if any."""
    fingerprint_L: np.ndarray

    @property
    def has_fingerprint(self) -> bool:
        return len(self.fingerprint_L) > 0 and bool(np.isfinite(self.fingerprint_L).all())


def responses_of(path: Path) -> Iterator[Response]:
    """The responses of a rollout file."""
    names = ("key", "prompt", "response", "outcome")
    table = read_columns(path, [*names, "group", "correct", "fingerprint"])
    texts = zip(*(texts_of(table[name]) for name in names), strict=True)
    numbers = zip(table["group"].to_pylist(), table["correct"].to_pylist(), strict=True)
    for (key, prompt, text, outcome), (group, correct), fingerprint_L in zip(
        texts, numbers, vectors_of(table["fingerprint"]), strict=True
    ):
        rule = rule_of(prompt, text)
        is_wrong = not correct and outcome not in ("timeout", "error")
        yield Response(key, group, text, is_wrong, None if rule is None else str(rule), fingerprint_L)


class WrongResponses:
    """The wrong responses of some steps."""

    def __init__(self) -> None:
        self._group_answers: dict[tuple[int, int], set[str]] = {}
        self._by_key: dict[str, list[tuple[str, str, np.ndarray]]] = defaultdict(list)
        """Habit, final answer and fingerprint by memory key, of responses that have all three."""

    def add(self, responses: Iterable[Response], step: int) -> None:
        """The responses of a step's rollout file."""
        for response in responses:
            answers = self._group_answers.setdefault((step, response.group), set())
            if not response.is_wrong:
                continue
            answer = answer_class(last_boxed(response.text) or "")
            answers.add(answer)
            if response.rule is not None and response.has_fingerprint:
                self._by_key[response.key].append((response.rule, answer, response.fingerprint_L))

    def diversity(self) -> dict[str, float | None]:
        """`wrong_answers` and `eigenvalue_ratio`."""
        if not self._group_answers:
            return {"wrong_answers": None, "eigenvalue_ratio": None}
        counts = [len(answers) for answers in self._group_answers.values()]
        vectors = [fingerprint_L for rows in self._by_key.values() for *_, fingerprint_L in rows]
        ratio = None
        if vectors:
            ratio = top_eigenvalue_share(*Moments.empty(len(vectors[0])).plus(np.stack(vectors)))
        return {"wrong_answers": float(np.mean(counts)), "eigenvalue_ratio": ratio}

    def agreement(self, config: Config) -> dict[str, float | None]:
        """`ari_fingerprint` and `ari_answer`, over the problems with two such responses or more."""
        memory = replace(config.memory, method="hdbscan", window=None, budget_gib=None)
        weights, by_fingerprint, by_answer = [], [], []
        for rows in self._by_key.values():
            if len(rows) < 2:
                continue
            rules, answers, fingerprints = zip(*rows, strict=True)
            weights.append(len(rows))
            by_fingerprint.append(adjusted_rand_score(rules, clusters_of(np.stack(fingerprints), memory)))
            by_answer.append(adjusted_rand_score(rules, answers))
        if not weights:
            return {"ari_fingerprint": None, "ari_answer": None}
        return {
            "ari_fingerprint": float(np.average(by_fingerprint, weights=weights)),
            "ari_answer": float(np.average(by_answer, weights=weights)),
        }


def clusters_of(fingerprints_NL: np.ndarray, config: MemoryConfig) -> list[int]:
    """Labels that the memory gives a problem's fingerprints; each noise vector is alone with `noise: ignore`."""
    shard = MemoryShard(config)
    shard.remember([""] * len(fingerprints_NL), fingerprints_NL)
    shard.recluster()
    return separate_noise(shard.labels("").tolist(), config)


def separate_noise(labels: list[int], config: MemoryConfig) -> list[int]:
    """Labels in which each noise vector is a cluster of its own, unless the memory counts noise as one."""
    if config.noise == "cluster":
        return labels
    return [label if label >= 0 else -1 - place for place, label in enumerate(labels)]
