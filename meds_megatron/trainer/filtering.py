"""Dynamic sampling: the groups that a step keeps."""

import numpy as np
import torch

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.algorithm.group_filter import keep_groups
from meds_megatron.config import Config, FilterConfig
from meds_megatron.errors import UserError
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.user_functions import is_function, load_function


def mark_kept(rollouts: RolloutBatch, config: FilterConfig, missing: int) -> None:
    """Keeps the first `missing` groups that have a spread in the filter's metric, and no other. Responses whose grading
    failed have no metric."""
    batch = rollouts.batch
    keep = [True] * len(rollouts.groups)
    if config.metric != "none":
        values_B = _metric(batch, config.metric)
        keep_B = keep_groups(*map(torch.from_numpy, (values_B, batch.groups_B, rollouts.graded_B)))
        keep = [bool(keep_B[batch.groups_B == number].all()) for number in range(len(rollouts.groups))]
    for group, wanted in zip(rollouts.groups, keep, strict=True):
        group.kept = wanted and missing > 0
        missing -= group.kept


def _metric(batch: TrainBatch, name: str) -> np.ndarray:
    if is_function(name):
        values_B = np.asarray(load_function("filter.metric", name)(batch))
        if values_B.shape != (len(batch),):
            raise UserError(f"filter.metric is {name}, which gave an array {values_B.shape}, expected ({len(batch)},)")
        return values_B
    found_B = batch.correct_B if name == "accuracy" else batch.shaped_scores_B
    assert found_B is not None
    return found_B


def shortfall(rollouts: RolloutBatch, config: Config) -> str | None:
    """Half a sentence when the step trains on fewer prompts than it should."""
    kept, wanted = len(rollouts.kept_groups), config.train.prompts_per_step
    if kept == wanted:
        return None
    return (
        f"{rollouts.generation_batches} generation batches gave {kept} of {wanted} prompts that pass the filter "
        f"(filter.metric={config.filter.metric})"
    )
