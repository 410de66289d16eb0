"""Statistics of graded responses to problems: accuracy, pass@k, majority vote, their intervals, and distinct answers.

A problem is given by the verdicts on its responses, at most n of them: right (1) or wrong (0), those whose grading
failed left out. A problem counts in a metric only if it has as many graded responses as the metric needs.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def accuracy_metrics(accuracies: Sequence[Sequence[float]], responses: int) -> dict[str, float]:
    """`accuracy`, `mean@<n>` and `pass@<k>` of problems whose graded responses are right (1) or wrong (0), at most
    `responses` of each; a metric that no problem counts in is missing."""
    graded = [accuracy for accuracy in accuracies if len(accuracy)]
    if not graded:
        return {}
    metrics = {"accuracy": float(np.mean(mean_accuracies(graded)))}
    if responses == 1:
        return metrics
    metrics[f"mean@{responses}"] = metrics["accuracy"]
    for k in powers_of_two(responses):
        if estimates := pass_estimates(graded, k):
            metrics[f"pass@{k}"] = float(np.mean(estimates))
    return metrics


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n."""
    return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})


def mean_accuracies(accuracies: Sequence[Sequence[float]]) -> list[float]:
    """Share of right responses of each problem that has a graded one."""
    return [float(np.mean(accuracy)) for accuracy in accuracies if len(accuracy)]


def pass_estimates(accuracies: Sequence[Sequence[float]], k: int) -> list[float]:
    """`pass_at_k` of each problem with at least k graded responses."""
    return [pass_at_k(len(accuracy), int(sum(accuracy)), k) for accuracy in accuracies if len(accuracy) >= k]


def pass_at_k(responses: int, right: int, k: int) -> float:
    """Probability that at least one of `k` responses is right, without bias from `right` of `responses` >= k right
    ones: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, section 2.1)."""
    return 1.0 - math.comb(responses - right, k) / math.comb(responses, k)


def answer_groups(answers: Sequence[str], correct: Sequence[bool | None]) -> Counter[str | None]:
    """Number of responses with each answer, those without one left out. All right answers are one group, None; wrong
    ones are apart where their texts are."""
    votes = [None if right else answer for answer, right in zip(answers, correct, strict=True) if answer or right]
    return Counter(votes)


def majority_correct(answers: Sequence[str], correct: Sequence[bool | None]) -> float:
    """Whether the most frequent answer is right (maj@n): 1 or 0, and with t equally frequent ones 1 / t if one is."""
    groups = answer_groups(answers, correct)
    most = max(groups.values(), default=0)
    tied = [group for group, votes in groups.items() if votes == most]
    return 1.0 / len(tied) if None in tied else 0.0


def bootstrap_interval(values_P: Sequence[float]) -> tuple[float, float]:
    """Interval of CONFIDENCE of the mean over problems, by the percentiles of RESAMPLES resampled means.

    Problems are drawn with replacement, always the same ones for the same number of problems.
    """
    values = np.asarray(values_P, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)), dtype=np.int32)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values[draws].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)


def top_eigenvalue_ratio(vectors_NL: np.ndarray) -> float:
    """Share of the largest eigenvalue in the trace of the covariance of N vectors: 1 if they differ in one direction
    only, near 1 / L if in all alike. NaN for fewer than two vectors, or equal ones."""
    if len(vectors_NL) < 2:
        return float("nan")
    # Squared singular values of the centred vectors are proportional to the eigenvalues of their covariance.
    variances = np.linalg.svd(vectors_NL - vectors_NL.mean(axis=0), compute_uv=False).astype(np.float64) ** 2
    return float(variances[0] / variances.sum()) if variances.sum() > 0 else float("nan")
