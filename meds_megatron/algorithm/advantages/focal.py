"""Focal weights of prompts: F-GRPO (arXiv 2602.06717)."""

import torch
from torch import Tensor

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput, sum_groups
from meds_megatron.config import AdvantageConfig


def focal_weighted(inputs: AdvantageInputs, advantages_B: Tensor, config: AdvantageConfig) -> AdvantageOutput:
    """Advantages times (1 - m) ** focal_gamma, where m is the share of right responses in the group: prompts that are
    often solved weigh less.

    Only the abstract of the paper and a summary with this formula were available. Metric: `focal_weight`, the mean
    weight of a response.
    """
    _, index_B, sizes_G = torch.unique(inputs.groups_B, return_inverse=True, return_counts=True)
    right_G = sum_groups(inputs.correct_B.double(), index_B, len(sizes_G)) / sizes_G
    weights_B = ((1 - right_G) ** config.focal_gamma)[index_B].to(advantages_B.dtype)
    mean = weights_B.sum().item() / max(len(weights_B), 1)
    return AdvantageOutput(advantages_B * weights_B, {"focal_weight": mean})
