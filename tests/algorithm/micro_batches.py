"""Micro-batches to test losses with."""

import torch
from torch import Tensor

from meds_megatron.algorithm.aggregation import aggregation_weights
from meds_megatron.algorithm.losses import LossInputs


def micro_batch(
    logprobs: Tensor | list[float],
    old_logprobs: Tensor | list[float],
    advantages: Tensor | list[float],
    weights: Tensor | list[float] | None = None,
    lengths: Tensor | list[int] | None = None,
    rollout_logprobs: Tensor | list[float] | None = None,
    entropy: Tensor | list[float] | None = None,
) -> LossInputs:
    """Loss inputs: by default all tokens have weight 1 and are one response, the rollout's log-probs are the old ones
    and entropy is 0. Lists become float64 tensors; the log-probs require a gradient."""

    def tensor(values) -> Tensor:
        return values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)

    logprobs_T = tensor(logprobs)
    if not logprobs_T.requires_grad:
        logprobs_T = logprobs_T.clone().requires_grad_()
    old_T = tensor(old_logprobs)
    return LossInputs(
        logprobs_T=logprobs_T,
        old_logprobs_T=old_T,
        rollout_logprobs_T=old_T if rollout_logprobs is None else tensor(rollout_logprobs),
        entropy_T=torch.zeros_like(old_T) if entropy is None else tensor(entropy),
        advantages_T=tensor(advantages),
        weights_T=torch.ones_like(old_T) if weights is None else tensor(weights),
        lengths_B=torch.tensor([len(old_T)]) if lengths is None else torch.as_tensor(lengths),
    )


def random_micro_batch(aggregation: str, *, noise: float = 0.5, token_advantages: bool = False) -> LossInputs:
    """Eight responses of 1 to 9 tokens (float64), with their weights as the only ones of a mini-batch."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.tensor([5, 1, 7, 2, 9, 3, 3, 4])
    tokens = int(lengths_B.sum())
    old_T, noise_T, rollout_noise_T, advantages_T = torch.randn(4, tokens, generator=generator, dtype=torch.float64)
    if not token_advantages:
        advantages_T = advantages_T[:8].repeat_interleave(lengths_B)
    totals = dict(total_tokens=tokens, total_responses=8, max_response_tokens=16)
    weights_T = aggregation_weights(lengths_B, aggregation, **totals).double().repeat_interleave(lengths_B)
    logprobs_T, rollout_T = old_T + noise * noise_T, old_T + 0.5 * rollout_noise_T
    return micro_batch(logprobs_T, old_T, advantages_T, weights_T, lengths_B, rollout_T)


def responses(inputs: LossInputs, first: int, last: int) -> LossInputs:
    """The responses `first` to `last` - 1 as a micro-batch, whose gradient reaches the log-probs of `inputs`."""
    start, stop = int(inputs.lengths_B[:first].sum()), int(inputs.lengths_B[:last].sum())
    values = {name: value_T[start:stop] for name, value_T in vars(inputs).items() if name != "lengths_B"}
    return LossInputs(**values, lengths_B=inputs.lengths_B[first:last])


def gradient(inputs: LossInputs, loss: Tensor) -> Tensor:
    """d loss / d logprobs_T."""
    return torch.autograd.grad(loss, inputs.logprobs_T)[0]
