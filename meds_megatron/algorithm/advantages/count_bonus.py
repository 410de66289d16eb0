"""Bonus for answers that are rare in the history of the prompt: outcome-based exploration (arXiv 2509.06941)."""

import torch
from torch import Tensor

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput
from meds_megatron.config import AdvantageConfig


def count_bonus(inputs: AdvantageInputs, advantages_B: Tensor, config: AdvantageConfig) -> AdvantageOutput:
    """A + count_coefficient * (min(1, 1 / sqrt(n)) - count_baseline), where n is how often earlier steps gave the same
    answer to the prompt; responses that were not looked up keep their advantage.

    Only the abstract of the paper was available; it names bonuses in the style of upper confidence bounds for rarely
    observed answers. The bonus min(1, n^-1/2) and its constant baseline (the paper's UCB-Con) are written from what is
    generally known of it; the constants of our config are ours.

    Metric: `count_bonus`, the mean addition to a response that was looked up.
    """
    known_B = inputs.counts_B >= 0
    rarity_B = inputs.counts_B.clamp(min=1).to(advantages_B.dtype).rsqrt()
    bonus_B = torch.where(known_B, config.count_coefficient * (rarity_B - config.count_baseline), 0.0)
    mean = bonus_B.sum().item() / max(int(known_B.sum()), 1)
    return AdvantageOutput(advantages_B + bonus_B, {"count_bonus": mean})
