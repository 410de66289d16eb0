"""Group-relative advantages: GRPO (arXiv 2402.03300), and Dr.GRPO (arXiv 2503.20783) without the deviation."""

import torch

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput, sum_groups
from meds_megatron.config import AdvantageConfig


def group_relative(inputs: AdvantageInputs, config: AdvantageConfig) -> AdvantageOutput:
    """Distance of each score from its group's mean, in the type of `scores_B`.

    With `normalize_std` it is divided by the group's unbiased standard deviation plus `epsilon`. In a group that is all
    wrong or all right the deviation is at least `std_floor`: its scores differ by penalties only, which a small
    deviation would scale up to full size. A group of one has advantage 0.

    Metric, with a floor: `floored_share`, the share of responses whose group's deviation is below it.
    """
    scores_B = inputs.scores_B.double()  # Equal scores must give exactly 0 although epsilon is small.
    _, index_B, sizes_G = torch.unique(inputs.groups_B, return_inverse=True, return_counts=True)
    means_G = sum_groups(scores_B, index_B, len(sizes_G)) / sizes_G
    advantages_B = scores_B - means_G[index_B]
    metrics = {}
    if config.normalize_std:
        variances_G = sum_groups(advantages_B.square(), index_B, len(sizes_G)) / (sizes_G - 1).clamp(min=1)
        std_B = variances_G.sqrt()[index_B]
        right_G = sum_groups(inputs.correct_B.double(), index_B, len(sizes_G))
        floor_B = torch.where((right_G > 0) & (right_G < sizes_G), 0.0, config.std_floor)[index_B]
        advantages_B = advantages_B / (torch.maximum(std_B, floor_B) + config.epsilon)
        if config.std_floor > 0:
            metrics["floored_share"] = int((std_B < floor_B).sum()) / max(len(std_B), 1)
    return AdvantageOutput(advantages_B.to(inputs.scores_B.dtype), metrics)
