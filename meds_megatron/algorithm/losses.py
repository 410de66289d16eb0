"""The policy loss. Its normaliser is global and comes from outside, so that no layout can change the result.

A mini-batch is cut into micro-batches over ranks and time. `token_weights` puts the whole division into one weight a
response, so that the plain SUM of every micro-batch's loss over all ranks is the loss of the mini-batch: whoever adds
them up must not average again.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meds_megatron.config import PolicyConfig

LOG_RATIO_LIMIT = 20.0


@dataclass
class PolicyLossOutput:
    """A micro-batch's share of the mini-batch's loss (a scalar with gradient), and sums for metrics (scalars without).

    `sums` are to be added over micro-batches and ranks and divided by `sums["tokens"]`: `clipped` and `dual_clipped`
    count the tokens whose ratio was clipped, `ratio` adds new / old probabilities, `kl` adds the (never negative) k3
    estimate of KL(old || new) in nats.
    """

    loss: Tensor
    sums: dict[str, Tensor]


def token_weights(
    lengths_B: Tensor,
    loss: Literal["token_mean", "sequence_mean", "sequence_sum"],
    *,
    total_tokens: int,
    total_responses: int,
    max_response_tokens: int,
) -> Tensor:
    """weights_B (float32): the weight of each token of a response in the mini-batch's loss.

    `lengths_B` are tokens of the responses at hand; the totals are those of the whole mini-batch over all ranks. All
    tokens weigh the same (`token_mean`), all responses weigh the same (`sequence_mean`), or a response's tokens are
    added up and divided by the constant `max_response_tokens` (`sequence_sum`).
    """
    lengths = lengths_B.to(torch.float32)
    if loss == "token_mean":
        return torch.full_like(lengths, 1.0 / max(total_tokens, 1))
    if loss == "sequence_mean":
        return 1.0 / (lengths.clamp(min=1.0) * max(total_responses, 1))
    return torch.full_like(lengths, 1.0 / (max_response_tokens * max(total_responses, 1)))


def policy_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    config: PolicyConfig,
    importance_T: Tensor | None = None,
) -> PolicyLossOutput:
    """The clipped policy-gradient loss of a micro-batch: sum of weight * token loss.

    The probability ratio is clipped to [1 - clip_low, 1 + clip_high] where that lowers the objective; for negative
    advantages it is also held below `dual_clip`. `importance_T` multiplies each token's loss. Tokens of weight 0
    (padding) count nowhere.
    """
    log_ratio_T = (logprobs_T - old_logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio_T = log_ratio_T.exp()
    plain_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss_T = torch.maximum(plain_T, clipped_T)
    is_clipped_T = clipped_T > plain_T
    is_dual_clipped_T = torch.zeros_like(is_clipped_T)
    if config.dual_clip is not None:
        ceiling_T = -advantages_T * config.dual_clip
        is_dual_clipped_T = (advantages_T < 0) & (ceiling_T < loss_T)
        loss_T = torch.where(is_dual_clipped_T, ceiling_T, loss_T)
    if importance_T is not None:
        loss_T = loss_T * importance_T

    counted_T = weights_T != 0
    per_token = {
        "tokens": counted_T,
        "clipped": is_clipped_T,
        "dual_clipped": is_dual_clipped_T,
        "ratio": ratio_T,
        "kl": torch.expm1(log_ratio_T) - log_ratio_T,
    }
    with torch.no_grad():
        sums = {name: (values_T * counted_T).sum(dtype=torch.float32) for name, values_T in per_token.items()}
    return PolicyLossOutput(loss=(loss_T * weights_T).sum(), sums=sums)
