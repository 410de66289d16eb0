"""CISPO, clipped importance weights (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    loss_t = -sg[clip(r_t, 1 - clip_low, 1 + clip_high)] A_t log pi(y_t),  r_t = pi(y_t) / pi_old(y_t)

The weight is clipped, not the update: every token keeps a gradient. The published aggregation is `token_mean`, with no
lower bound (`clip_low` 1); the paper does not give its `clip_high`. There is no dual clip.
"""

from meds_megatron.algorithm.losses.base import LossInputs, LossOutput, weighted_sum
from meds_megatron.config import PolicyConfig


def cispo_loss(inputs: LossInputs, config: PolicyConfig) -> LossOutput:
    """REINFORCE with clipped importance weights. Metrics: `ratio` before clipping, and the tokens whose weight was
    clipped (`clip_fraction`)."""
    ratio_T = inputs.log_ratio_T.detach().exp()
    clipped_T = ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = -clipped_T * inputs.advantages_T * inputs.logprobs_T
    return weighted_sum(loss_T, inputs, config, ratio=ratio_T, clip_fraction=clipped_T != ratio_T)
