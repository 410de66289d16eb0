"""Inputs and outputs of every policy loss, and the parts that the losses share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from meds_megatron.algorithm.corrections import importance_weights
from meds_megatron.algorithm.log_ratios import LOG_RATIO_LIMIT
from meds_megatron.config import PolicyConfig


@dataclass(frozen=True)
class LossInputs:
    """The T drawn tokens of a micro-batch of B responses, response after response; no response is ever cut.

    Tokens of weight 0 count neither in the loss nor in the metrics.
    """

    logprobs_T: Tensor
    """Log-probs (nats) under the policy being trained, with gradient."""
    old_logprobs_T: Tensor
    """Log-probs under the policy at the start of the step, from the trainer."""
    rollout_logprobs_T: Tensor
    """Log-probs as the rollout engine drew the tokens: under the policy at the start of the step, or an older one."""
    entropy_T: Tensor
    """Entropy (nats) of the policy being trained at each token, from the forward pass that gives `logprobs_T`."""
    advantages_T: Tensor
    weights_T: Tensor
    """Aggregation weights: see `algorithm.aggregation`."""
    lengths_B: Tensor
    """Drawn tokens of each response (int64); they add up to T."""

    @property
    def log_ratio_T(self) -> Tensor:
        """log(new / old probability) of each token, with gradient, within +-LOG_RATIO_LIMIT."""
        return (self.logprobs_T - self.old_logprobs_T).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def token_sum(self, values_T: Tensor) -> Tensor:
        """Sum of `values_T` over the counted tokens: a float32 scalar without gradient."""
        return (values_T.detach() * (self.weights_T != 0)).sum(dtype=torch.float32)


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's share of the mini-batch's loss.

    `token_sums` (float32 scalars without gradient) are added over micro-batches and data-parallel ranks, divided by
    `token_sums["tokens"]`, the tokens that count, which every loss has, and reported as `policy/<name>`.
    """

    loss: Tensor
    token_sums: dict[str, Tensor]


def weighted_sum(loss_T: Tensor, inputs: LossInputs, config: PolicyConfig, **metrics_T: Tensor) -> LossOutput:
    """The loss of a micro-batch from its token losses; `metrics_T` hold a loss's own metrics, one value a token.

    With `policy.importance` each token's loss is multiplied by its importance weight, which `importance_weight`,
    `importance_square` and `importance_dropped` describe. `tokens` and `kl`, the (never negative) k3 estimate of
    KL(old || new) in nats, are reported for every loss.
    """
    if config.importance in ("token", "sequence"):
        importance_T = importance_weights(inputs.old_logprobs_T, inputs.rollout_logprobs_T, inputs.lengths_B, config)
        loss_T = loss_T * importance_T
        metrics_T["importance_weight"] = importance_T
        metrics_T["importance_square"] = importance_T.square()
        metrics_T["importance_dropped"] = importance_T == 0
    log_ratio_T = inputs.log_ratio_T.detach()
    metrics_T["tokens"] = torch.ones_like(loss_T)
    metrics_T["kl"] = torch.expm1(log_ratio_T) - log_ratio_T
    token_sums = {name: inputs.token_sum(values_T) for name, values_T in metrics_T.items()}
    return LossOutput((loss_T * inputs.weights_T).sum(), token_sums)
