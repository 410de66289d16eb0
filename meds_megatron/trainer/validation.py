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
from meds_megatron.data.prompts import Prompt
from meds_megatron.evaluation.statistics import accuracy_metrics
from meds_megatron.rollout.producer import GroupProducer, failed_gradings
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.trainer.interruption import Interruption
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.timer import PhaseTimer
from meds_megatron.trainer.weight_sync import WeightSync

logger = logging.getLogger(__name__)


def validation_due(step: int, prompts: Prompts, config: Config) -> bool:
    """Before the first step, every `train.validate_every` steps and after the last one, if there are prompts for it."""
    every = config.train.validate_every
    return bool(every and prompts.validation) and (step % every == 0 or step == config.train.steps)


def validate(
    prompts: Sequence[Prompt],
    config: Config,
    producer: GroupProducer,
    weight_sync: WeightSync,
    timer: PhaseTimer,
    interruption: Interruption,
) -> dict[str, float]:
    """The metrics of one validation, in which every prompt is generated once; none of a validation during which a stop
    is requested, so that the step under way can be finished in time."""
    groups: list[PromptGroup] = []
    with timer("validation"):
        # The same draws every time, so that two validations differ by the policy alone.
        producer.submit(prompts, Sampling.validation(config.rollout), config.train.seed)
        while producer.busy:
            if interruption.requested.done():
                logger.warning("a validation was abandoned: its step has no validation metrics")
                return {}
            weight_sync.refill()
            groups += producer.advance(interruption.requested)
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
