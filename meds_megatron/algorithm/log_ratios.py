"""Log-ratios of two policies' probabilities, of tokens and of whole responses."""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Bound on |log-ratio|: a ratio that runs away stays finite in float32."""


def response_sums(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """Sum over each response's tokens, [B], for the T tokens of B responses, response after response."""
    # Not index_add: it adds in no fixed order on CUDA. The checks that `unsafe` skips refuse empty micro-batches.
    return torch.segment_reduce(values_T, "sum", lengths=lengths_B, unsafe=True)


def at_tokens(values_B: Tensor, lengths_B: Tensor, tokens: int) -> Tensor:
    """Each response's value at each of its tokens, [T]; `tokens` is T."""
    return values_B.repeat_interleave(lengths_B, output_size=tokens)
