"""Log-probs and entropy straight from hidden states, vocab-parallel and in blocks of tokens.

Full logits of a block exist only while the block is computed; the backward pass makes them again. They are accumulated
and kept in float32: rounded to bfloat16 first, a logit of 16 to 32 moves in steps of 1/8, and a ratio by 13 %.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from meds_megatron.config.model_shape import LOGITS_BLOCK_TOKENS

_NEVER = -1e30
"""Logit of a padded vocabulary row: probability 0, and 0 * _NEVER stays 0 in the entropy."""


def logprobs_and_entropy(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    block_tokens: int = LOGITS_BLOCK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target and entropy of its distribution, both float32 [R]; only the log-prob has a gradient.

    `weight_VH` holds this tensor-parallel rank's rows of the head. Rows from `vocab_size` on (of the whole head) are
    padding. The gradient that reaches `hidden_RH` is this rank's part: the caller's region op sums it over the ranks.
    That of the head is added to its float32 `main_grad` where it has one (megatron-core's gradient buffers), and
    returned in the head's own type otherwise.
    """
    return _VocabParallelLogProb.apply(hidden_RH, weight_VH, targets_R, temperature, vocab_size, block_tokens)


class _VocabParallelLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, targets_R, temperature, vocab_size, block_tokens):
        group = parallel_state.get_tensor_model_parallel_group()
        first_row = parallel_state.get_tensor_model_parallel_rank() * weight_VH.shape[0]
        padded = slice(max(0, vocab_size - first_row), None)
        logprobs_R = torch.empty(len(targets_R), dtype=torch.float32, device=hidden_RH.device)
        entropy_R = torch.empty_like(logprobs_R)
        log_normalizer_R = torch.empty_like(logprobs_R)
        for part in _blocks(len(targets_R), block_tokens):
            logits_CV = _logits(hidden_RH[part], weight_VH, temperature, padded)
            peak_C = logits_CV.amax(dim=-1)
            dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=group)
            logits_CV -= peak_C[:, None]
            targets_C, mine_C = _local_targets(targets_R[part], first_row, weight_VH.shape[0])
            chosen_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1) * mine_C
            weights_CV = logits_CV.exp()
            sums_3C = torch.stack([weights_CV.sum(-1), (weights_CV * logits_CV).sum(-1), chosen_C])
            dist.all_reduce(sums_3C, group=group)
            total_C, weighted_C, chosen_C = sums_3C
            logprobs_R[part] = chosen_C - total_C.log()
            entropy_R[part] = total_C.log() - weighted_C / total_C
            log_normalizer_R[part] = peak_C + total_C.log()
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, log_normalizer_R)
        ctx.settings = (temperature, padded, first_row, block_tokens)
        ctx.mark_non_differentiable(entropy_R)
        return logprobs_R, entropy_R

    @staticmethod
    def backward(ctx, grad_R, _grad_entropy_R):
        hidden_RH, weight_VH, targets_R, log_normalizer_R = ctx.saved_tensors
        temperature, padded, first_row, block_tokens = ctx.settings
        grad_hidden_RH = torch.empty_like(hidden_RH)
        main_grad_VH = getattr(weight_VH, "main_grad", None)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if main_grad_VH is None else main_grad_VH
        for part in _blocks(len(targets_R), block_tokens):
            grad_CV = _logits(hidden_RH[part], weight_VH, temperature, padded)
            grad_CV.sub_(log_normalizer_R[part, None]).exp_().neg_()
            targets_C, mine_C = _local_targets(targets_R[part], first_row, weight_VH.shape[0])
            grad_CV.scatter_add_(1, targets_C[:, None], mine_C[:, None].to(grad_CV.dtype))
            grad_CV.mul_(grad_R[part, None] / temperature)
            grad_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_RH[part] = grad_CV @ weight_VH
            add_float32_product(grad_weight_VH, grad_CV.T, hidden_RH[part])
        # What is in the buffer already would be added to it once more.
        returned_VH = grad_weight_VH.to(weight_VH.dtype) if main_grad_VH is None else None
        return grad_hidden_RH, returned_VH, None, None, None, None


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, padded: slice) -> Tensor:
    logits_CV = float32_product(hidden_CH, weight_VH.T)
    if temperature != 1.0:
        logits_CV /= temperature
    logits_CV[:, padded] = _NEVER
    return logits_CV


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """`left` @ `right` of matrices of one type, accumulated in float32 and not rounded to that type."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_float32_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `float32_product(left, right)` to the float32 matrix `total`."""
    if left.is_cuda and left.dtype is not torch.float32:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


def _local_targets(targets_C: Tensor, first_row: int, rows: int) -> tuple[Tensor, Tensor]:
    """Targets as this rank's rows (0 where another rank owns them), and which ones are its own."""
    local_C = targets_C - first_row
    mine_C = (local_C >= 0) & (local_C < rows)
    return torch.where(mine_C, local_C, 0), mine_C
