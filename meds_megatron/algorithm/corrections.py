"""Differences between the log-probs of the rollout engine and of the trainer, and their correction.

Both are of the policy that sampled the responses; the two programs round differently.
"""

import math

import torch
from torch import Tensor


def importance_weights(old_logprobs_T: Tensor, rollout_logprobs_T: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling: weights_T = min(p_trainer / p_rollout, cap), without gradient."""
    log_weights_T = old_logprobs_T.detach() - rollout_logprobs_T.detach()
    return log_weights_T.clamp(max=math.log(cap)).exp()


def logprob_mismatch(trainer_logprobs_T: Tensor, rollout_logprobs_T: Tensor) -> dict[str, float]:
    """`logprob_abs_mean` and `logprob_abs_max` of |trainer - rollout| in nats; 0 for no tokens."""
    if trainer_logprobs_T.numel() == 0:
        return {"logprob_abs_mean": 0.0, "logprob_abs_max": 0.0}
    difference_T = (trainer_logprobs_T.double() - rollout_logprobs_T.double()).abs()
    return {"logprob_abs_mean": difference_T.mean().item(), "logprob_abs_max": torch.max(difference_T).item()}
