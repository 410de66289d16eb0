"""Group Sequence Policy Optimization (arXiv 2507.18071).

    s = (pi(y) / pi_old(y)) ** (1 / |y|) = exp(mean_t log(pi(y_t) / pi_old(y_t)))                           (eq. 7)
    loss of a response = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))                                 (eq. 5)

in its token-level form (eq. 13 and 14), which has the same value, clipping and gradient where a response's tokens share
one advantage, and which also allows an advantage a token:

    s_t = sg[s] pi(y_t) / sg[pi(y_t)],  loss_t = max(-A_t s_t, -A_t clip(s_t, 1 - clip_low, 1 + clip_high))

The published aggregation is `sequence_mean`, the published clip ranges are 3e-4 and 4e-4 (section 5.1): s lies much
closer to 1 than a token's ratio. The paper has no dual clip; with `dual_clip` s is held below it for A < 0.
"""

import torch
from torch import Tensor

from meds_megatron.algorithm.losses.base import LOG_RATIO_LIMIT, LossInputs, LossOutput
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
    # Not index_add: it adds in no fixed order on CUDA. The checks that `unsafe` skips refuse empty micro-batches.
    sums_B = torch.segment_reduce(log_ratio_T, "sum", lengths=lengths_B, unsafe=True)
    log_ratio_B = (sums_B / lengths_B.clamp(min=1)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio_B.repeat_interleave(lengths_B, output_size=len(log_ratio_T))
