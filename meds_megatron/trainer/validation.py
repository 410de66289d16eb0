"""Accuracy of the policy on held-out problems."""

import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.rollout.producer import GroupProducer, failed_gradings
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.timer import PhaseTimer
from meds_megatron.trainer.weight_sync import WeightSync

logger = logging.getLogger(__name__)


def validation_due(step: int, prompts: Prompts, config: Config) -> bool:
    """Before the first step, every `train.validate_every` steps and after the last one, if there are prompts for it."""
    every = config.train.validate_every
    return bool(every and prompts.validation) and (step % every == 0 or step == config.train.steps)


def validate(
    prompts: Sequence[Prompt], config: Config, producer: GroupProducer, weight_sync: WeightSync, timer: PhaseTimer
) -> dict[str, float]:
    """Accuracy over all prompts and over those of each data set, each prompt's a mean over
    `rollout.validation_responses` responses; `solved` counts prompts with at least one right response."""
    groups: list[PromptGroup] = []
    with timer("validation"):
        # The same draws every time, so that two validations differ by the policy alone.
        producer.submit(prompts, Sampling.validation(config.rollout), config.train.seed)
        while producer.busy:
            groups += producer.advance()
            weight_sync.refill()
    failed = failed_gradings(groups)
    lengths = [len(sample.completion.token_ids_R) for group in groups for sample in group.samples]
    if failed:
        logger.warning("validation: grading failed for %d of %d responses, counted as wrong", failed, len(lengths))
    by_dataset: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        by_dataset[group.prompt.problem.dataset].append(float(np.mean(group.accuracy)))
    return {
        "validation/grading_failed": failed,
        "validation/accuracy": float(np.mean([np.mean(group.accuracy) for group in groups])),
        "validation/solved": float(np.mean([max(group.accuracy) for group in groups])),
        "validation/response_length_mean": float(np.mean(lengths)),
        **{f"validation/{name}/accuracy": float(np.mean(values)) for name, values in by_dataset.items()},
    }
