"""Metrics of an evaluation: by data set and grader, each with its interval."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meds_megatron.evaluation.records import Grading, Record
from meds_megatron.evaluation.statistics import (
    answer_groups,
    bootstrap_interval,
    majority_correct,
    mean_accuracies,
    pass_estimates,
)

RATIO = "top1_eigenvalue_ratio"
"""Field of a row, and metric: share of the largest eigenvalue in the covariance of a problem's fingerprints."""


@dataclass(frozen=True)
class Metric:
    """A mean over problems with its interval (`statistics.CONFIDENCE`)."""

    name: str
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, name: str, values_P: Sequence[float]) -> "Metric":
        return cls(name, float(np.mean(values_P)), *bootstrap_interval(values_P))


@dataclass(frozen=True)
class Summary:
    """The metrics of one data set by one grader."""

    dataset: str
    grader: str
    problems: int
    responses: int
    """Responses to each problem, at most."""
    errors: int
    """Responses whose grading failed: they count in no metric."""
    metrics: list[Metric]
    """`mean@n`, `maj@n`, `distinct` (answers of a problem), `pass@k` for every k, and RATIO where it was requested."""

    @property
    def accuracy(self) -> float:
        """Mean over the problems of the share of right responses; NaN where nothing could be graded."""
        return next((metric.value for metric in self.metrics if metric.name.startswith("mean@")), float("nan"))

    def pass_at(self) -> dict[int, Metric]:
        """pass@k by k."""
        found = (metric for metric in self.metrics if metric.name.startswith("pass@"))
        return {int(metric.name.removeprefix("pass@")): metric for metric in found}


def summarise(dataset: str, records: Sequence[Record], grader: str, ks: Sequence[int]) -> Summary:
    """The metrics of a data set; those that no problem counts in are missing."""
    gradings = [record.gradings[grader] for record in records]
    accuracies = [grading.graded for grading in gradings]
    responses = max(len(record.responses) for record in records)
    values_by_name = {f"mean@{responses}": mean_accuracies(accuracies)}
    if responses > 1:
        values_by_name[f"maj@{responses}"] = [majority_correct(g.answers, g.correct) for g in gradings]
        values_by_name["distinct"] = [float(_distinct(grading)) for grading in gradings]
    values_by_name |= {f"pass@{k}": pass_estimates(accuracies, k) for k in sorted(set(ks))}
    ratios = [record.fields.get(RATIO) for record in records]
    values_by_name[RATIO] = [ratio for ratio in ratios if ratio is not None]
    metrics = [Metric.of(name, values) for name, values in values_by_name.items() if values]
    errors = sum(grading.errors for grading in gradings)
    return Summary(dataset, grader, len(records), responses, errors, metrics)


def _distinct(grading: Grading) -> int:
    return len(answer_groups(grading.answers, grading.correct))


def last_line(summaries: Sequence[Summary], **more: Any) -> str:
    """One JSON object: `n` problems, `accuracy` over all of them and `errors` by the first grader, `metrics` by data
    set and grader."""
    first = [summary for summary in summaries if summary.grader == summaries[0].grader]
    n = sum(summary.problems for summary in first)
    weights = [summary.problems for summary in first]
    accuracy = float(np.average([summary.accuracy for summary in first], weights=weights))
    metrics: dict[str, dict] = {}
    for summary in summaries:
        values = {metric.name: metric.value for metric in summary.metrics} | {"errors": summary.errors}
        metrics.setdefault(summary.dataset, {})[summary.grader] = values
    errors = sum(summary.errors for summary in first)
    content = {
        "n": n,
        "accuracy": None if np.isnan(accuracy) else accuracy,
        "errors": errors,
        "metrics": metrics,
    }
    return json.dumps(content | more)
