"""Weights that turn token losses into the loss of a mini-batch.

A mini-batch is cut into micro-batches over ranks and time. The whole normalisation is in the weights and uses totals of
the mini-batch. So in every layout the plain SUM of the micro-batches' losses over all ranks is the mini-batch's loss;
it must not be averaged again.
"""

from typing import Literal

import torch
from torch import Tensor


def aggregation_weights(
    lengths_B: Tensor,
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"],
    *,
    total_tokens: int,
    total_responses: int,
    max_response_tokens: int,
) -> Tensor:
    """weights_B (float32): weight of each token of a response in the mini-batch's loss.

    `lengths_B` are response tokens; the totals are those of the whole mini-batch over all ranks. `token_mean`: equal
    weight for all tokens (DAPO, arXiv 2503.14476). `sequence_mean`: equal weight for all responses (GRPO, arXiv
    2402.03300). `sequence_sum`: sum over a response's tokens divided by the constant `max_response_tokens`, then the
    mean of the responses (Dr.GRPO, arXiv 2503.20783).
    """
    lengths = lengths_B.to(torch.float32)
    if aggregation == "token_mean":
        return torch.full_like(lengths, 1.0 / max(total_tokens, 1))
    if aggregation == "sequence_mean":
        return 1.0 / (lengths.clamp(min=1.0) * max(total_responses, 1))
    return torch.full_like(lengths, 1.0 / (max_response_tokens * max(total_responses, 1)))
