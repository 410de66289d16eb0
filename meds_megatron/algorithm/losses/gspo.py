"""Group Sequence Policy Optimization (arXiv 2507.18071).

    s = (pi(y) / pi_old(y)) ** (1 / |y|) = exp(mean_t log(pi(y_t) / pi_old(y_t)))                           (eq. 7)
    loss of a response = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))                                 (eq. 5)

in its token-level form (eq. 13 and 14), which has the same value, clipping and gradient where a response's tokens share
one advantage, and which also allows an advantage a token:

    s_t = sg[s] pi(y_t) / sg[pi(y_t)],  loss_t = max(-A_t s_t, -A_t clip(s_t, 1 - clip_low, 1 + clip_high))

The published aggregation is `sequence_mean`, the published clip ranges are 3e-4 and 4e-4 (section 5.1): s lies much
closer to 1 than a token's ratio. The paper has no dual clip; with `dual_clip` s is held below it for A < 0.
"""

from torch import Tensor

from meds_megatron.algorithm.log_ratios import LOG_RATIO_LIMIT, at_tokens, response_sums
from meds_megatron.algorithm.losses.base import LossInputs, LossOutput
from meds_megatron.algorithm.losses.ppo import clipped_surrogate
from meds_megatron.config import PolicyConfig


def gspo_loss(inputs: LossInputs, config: PolicyConfig) -> LossOutput:
    """The clipped surrogate at the ratio of each token's whole response; metrics are those of `clipped_surrogate`."""
    logprobs_T = inputs.logprobs_T
    # The difference of log-probs comes first: it is exactly 0, so that s_t has the value of s to the last bit.
    log_ratio_T = logprobs_T - logprobs_T.detach() + _sequence_log_ratio(inputs)
    return clipped_surrogate(log_ratio_T.exp(), inputs, config)


def _sequence_log_ratio(inputs: LossInputs) -> Tensor:
    """log s of each token's response, without gradient."""
    log_ratio_T, lengths_B = inputs.logprobs_T.detach() - inputs.old_logprobs_T, inputs.lengths_B
    log_ratio_B = response_sums(log_ratio_T, lengths_B) / lengths_B.clamp(min=1)
    return at_tokens(log_ratio_B.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), lengths_B, len(log_ratio_T))
