"""PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with decoupled clip ranges (DAPO, arXiv 2503.14476, eq. 8) and dual
clip (arXiv 1912.09729, eq. 5); GRPO and DAPO are this loss with different settings.

    r_t = pi(y_t) / pi_old(y_t)
    loss_t = max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)), and for A_t < 0 at most -A_t dual_clip
"""

import torch
from torch import Tensor

from meds_megatron.algorithm.losses.base import LossInputs, LossOutput, weighted_sum
from meds_megatron.config import PolicyConfig


def ppo_loss(inputs: LossInputs, config: PolicyConfig) -> LossOutput:
    """The clipped surrogate at each token's own probability ratio."""
    return clipped_surrogate(inputs.log_ratio_T.exp(), inputs, config)


def clipped_surrogate(ratio_T: Tensor, inputs: LossInputs, config: PolicyConfig) -> LossOutput:
    """The clipped surrogate at any ratio. Metrics: `ratio`, and the tokens clipped (`clip_fraction`,
    `dual_clip_fraction`), through which no gradient flows."""
    advantages_T = inputs.advantages_T
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = torch.maximum(plain_T, clipped_T)
    is_clipped_T = clipped_T > plain_T
    is_dual_clipped_T = torch.zeros_like(is_clipped_T)
    if config.dual_clip is not None:
        ceiling_T = -advantages_T * config.dual_clip
        is_dual_clipped_T = (advantages_T < 0) & (ceiling_T < loss_T)
        loss_T = torch.where(is_dual_clipped_T, ceiling_T, loss_T)
    return weighted_sum(
        loss_T, inputs, config, ratio=ratio_T, clip_fraction=is_clipped_T, dual_clip_fraction=is_dual_clipped_T
    )
