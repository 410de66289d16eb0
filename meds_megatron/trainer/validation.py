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
from meds_megatron.rollout.producer import failed_gradings
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.generation import Generation

logger = logging.getLogger(__name__)


class Validator:
    """Validations of the policy, with the responses of the engines."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], generation: Generation, timer: PhaseTimer) -> None:
        self._config, self._prompts, self._generation, self._timer = config, prompts, generation, timer

    def is_due(self, step: int) -> bool:
        """Whether to validate: before the first step, every `train.validate_every` steps and after the last one, if
        there is data for it."""
        every = self._config.train.validate_every
        return bool(every and self._config.data.validation) and (step % every == 0 or step == self._config.train.steps)

    def validate(self) -> dict[str, float]:
        """Metrics of the responses to every prompt; none where a stop is requested meanwhile, so that the step under
        way can be finished in time."""
        return validation_metrics(self._generate(), self._config)

    def _generate(self) -> list[PromptGroup]:
        config, generation = self._config, self._generation
        overlaps = config.train.max_staleness > 0
        # The same draws every time, so that two validations differ by the policy alone; next to other requests no draws
        # can be repeated.
        seed = None if overlaps else config.train.seed
        with self._timer("validation"):
            numbers = generation.submit(self._prompts, Sampling.validation(config.rollout), seed, first=overlaps)
            awaited = set(numbers)
            groups: dict[int, PromptGroup] = {}
            while len(groups) < len(numbers):
                if generation.stop_requested:
                    logger.warning("a validation was abandoned: its step has no validation metrics")
                    return []
                generation.advance()
                groups |= generation.take_finished(awaited)
        return [groups[number] for number in numbers]


def validation_metrics(groups: Sequence[PromptGroup], config: Config) -> dict[str, float]:
    """The metrics of one validation, in which every prompt was generated once; none without groups."""
    if not groups:
        return {}
    failed = failed_gradings(groups)
    lengths = [len(sample.completion.token_ids_S) for group in groups for sample in group.samples]
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
