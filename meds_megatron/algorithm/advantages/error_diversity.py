"""Error diversity advantage shaping: EDAS (arXiv 2605.17333)."""

import torch
from torch import Tensor

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput, sum_groups
from meds_megatron.config import AdvantageConfig


def error_diversity(inputs: AdvantageInputs, advantages_B: Tensor, config: AdvantageConfig) -> AdvantageOutput:
    """Advantages of wrong responses, raised where their answer is rare among the wrong answers of the group and lowered
    where it is common.

    The N wrong responses of a group fall into classes of equal answer with shares p; I = -ln p, H is the entropy of the
    shares, S the mean |A| of the wrong responses. With several classes A changes by diversity_alpha * S * (I - H) /
    ln N, with a single one by -diversity_beta * S, at most by |A| / diversity_bound in either direction. Only the
    abstract of the paper was available; the formula is that of the project's own summary of it. Responses without an
    answer are one class, which is our choice.

    Metric: `error_entropy`, the mean of H over the groups with a wrong response.
    """
    wrong_B = ~inputs.correct_B.bool()
    before_N = advantages_B[wrong_B].double()
    _, group_N, wrong_G = torch.unique(inputs.groups_B[wrong_B], return_inverse=True, return_counts=True)
    pairs_2N = torch.stack([inputs.groups_B, inputs.answers_B])[:, wrong_B]
    _, class_N, sizes_C = torch.unique(pairs_2N, dim=1, return_inverse=True, return_counts=True)
    size_N, wrong_N = sizes_C[class_N].double(), wrong_G[group_N].double()
    surprisal_N = (wrong_N / size_N).log()
    entropy_G = sum_groups(surprisal_N, group_N, len(wrong_G)) / wrong_G
    strength_G = sum_groups(before_N.abs(), group_N, len(wrong_G)) / wrong_G
    # A group with several classes has two wrong responses or more: ln N is not 0 where it divides.
    spread_N = (surprisal_N - entropy_G[group_N]) / wrong_N.clamp(min=2).log()
    change_N = strength_G[group_N] * torch.where(
        size_N < wrong_N, config.diversity_alpha * spread_N, -config.diversity_beta
    )
    bound_N = before_N.abs() / config.diversity_bound
    after_N = before_N + torch.clamp(change_N, -bound_N, bound_N)
    shaped_B = advantages_B.clone()
    shaped_B[wrong_B] = after_N.to(advantages_B.dtype)
    return AdvantageOutput(shaped_B, {"error_entropy": entropy_G.sum().item() / max(len(entropy_G), 1)})
