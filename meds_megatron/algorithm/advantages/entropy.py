"""Entropy-shaped advantages (arXiv 2506.14758): A + min(coefficient * H, |A| / bound).

As published, H is the entropy of the policy in the update's own forward pass, without gradient: from the second
mini-batch of a step on it is not that of the policy which sampled the responses.
"""

import torch

from meds_megatron.algorithm.advantages.base import TokenAdvantageOutput
from meds_megatron.algorithm.losses import LossInputs
from meds_megatron.config import AdvantageConfig


def entropy_shaped(inputs: LossInputs, config: AdvantageConfig) -> TokenAdvantageOutput:
    """Advantages raised where the policy is undecided. A bound above 1 keeps the sign of A.

    Metric: `entropy_bonus`, the addition to a token's advantage.
    """
    bounds_T = inputs.advantages_T.abs() / config.entropy_bound
    bonus_T = torch.minimum(config.entropy_coefficient * inputs.entropy_T.detach(), bounds_T)
    return TokenAdvantageOutput(inputs.advantages_T + bonus_T, {"entropy_bonus": inputs.token_sum(bonus_T)})
