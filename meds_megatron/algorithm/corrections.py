"""Off-policy corrections: responses drawn by the rollout engine, trained on as if the trainer had drawn them.

The two differ since the programs round differently, and by whole updates of the policy where responses are older.
"""

import torch
from torch import Tensor

from meds_megatron.algorithm.log_ratios import LOG_RATIO_LIMIT, at_tokens, response_sums
from meds_megatron.config import PolicyConfig


def importance_weights(
    old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, lengths_B: Tensor, config: PolicyConfig
) -> Tensor:
    """weights_T (without gradient) of the T tokens of B responses, by `config.importance`.

        token:     r_t = pi_old(y_t) / pi_rollout(y_t)
        sequence:  r   = prod_t pi_old(y_t) / pi_rollout(y_t), the same for all tokens of a response
        weight     = min(r, importance_cap) where importance_low <= r <= importance_high, else 0

    `sequence` with no bounds is unbiased, and its variance grows with the length; `token` ignores that earlier tokens
    were drawn by another policy. Truncation is Ionides' (J. Comput. Graph. Stat. 17, 2008); leaving out what is outside
    of bounds is IcePop's (arXiv 2510.18855: of tokens, 0.5 and 5).
    """
    log_ratio_T = old_logprobs_T.detach() - rollout_logprobs_T.detach()
    if config.importance == "sequence":
        log_ratio_T = at_tokens(response_sums(log_ratio_T, lengths_B), lengths_B, len(log_ratio_T))
    ratio_T = log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    is_inside_T = torch.ones_like(ratio_T, dtype=torch.bool)
    if config.importance_low is not None:
        is_inside_T &= ratio_T >= config.importance_low
    if config.importance_high is not None:
        is_inside_T &= ratio_T <= config.importance_high
    if config.importance_cap is not None:
        ratio_T = ratio_T.clamp(max=config.importance_cap)
    return ratio_T * is_inside_T


def logprob_mismatch(trainer_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> dict[str, float]:
    """`logprob_abs_mean` and `logprob_abs_max` of |trainer - rollout| in nats; 0 for no tokens."""
    if trainer_logprobs_T.numel() == 0:
        return {"logprob_abs_mean": 0.0, "logprob_abs_max": 0.0}
    difference_T = (trainer_logprobs_T.double() - rollout_logprobs_T.double()).abs()
    return {"logprob_abs_mean": difference_T.mean().item(), "logprob_abs_max": torch.max(difference_T).item()}
