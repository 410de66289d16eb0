"""Accuracy of the policy on held-out problems.

Metrics, over all problems (`validation/...`) and over those of each data set (`validation/<data set>/...`), with n =
`rollout.validation_responses` responses to each:

- `accuracy`: mean over the problems of the share of right responses; with n > 1 also as `mean@<n>`.
- `pass@<k>`, with n > 1, for k = 1, 2, 4, ... and n: mean over the problems of the probability that at least one of k
  responses is right, estimated without bias from all n; pass@n is the share of problems with any right response.

Over all problems alone: `grading_failed`, responses that are neither right nor wrong and count in none of the others,
and `response_length_mean` in tokens. A problem with fewer than k graded responses does not count in pass@k.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from meds_megatron.config import Config
from meds_megatron.evaluation.statistics import accuracy_metrics
from meds_megatron.rollout.producer import failed_gradings
from meds_megatron.rollout.samples import PromptGroup

logger = logging.getLogger(__name__)


def validation_due(step: int, config: Config) -> bool:
    """Before the first step, every `train.validate_every` steps and after the last one, if there is data for it."""
    every = config.train.validate_every
    return bool(every and config.data.validation) and (step % every == 0 or step == config.train.steps)


def validation_metrics(groups: Sequence[PromptGroup], config: Config) -> dict[str, float]:
    """The metrics of one validation, in which every prompt was generated once; none without groups."""
    if not groups:
        return {}
    failed = failed_gradings(groups)
    lengths = [len(sample.completion.token_ids_R) for group in groups for sample in group.samples]
    if failed:
        logger.warning("validation: grading failed for %d of %d responses, left out", failed, len(lengths))
    by_dataset: dict[str, list[list[float]]] = defaultdict(list)
    for group in groups:
        by_dataset[group.prompt.problem.dataset].append(group.accuracy)
    responses = config.rollout.validation_responses
    metrics = {"validation/grading_failed": failed, "validation/response_length_mean": float(np.mean(lengths))}
    for prefix, accuracies in {"": [group.accuracy for group in groups], **by_dataset}.items():
        for name, value in accuracy_metrics(accuracies, responses).items():
            metrics[f"validation/{prefix}/{name}" if prefix else f"validation/{name}"] = value
    return metrics
