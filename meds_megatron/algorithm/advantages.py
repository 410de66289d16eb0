"""From one score a response to one advantage a response, and to one a token."""

import torch
from torch import Tensor


def group_advantages(
    scores_B: Tensor,
    groups_B: Tensor,
    *,
    normalize_std: bool,
    epsilon: float = 1e-6,
    least_std_B: Tensor | float = 0.0,
) -> Tensor:
    """How much better each response is than the others of its prompt: advantages_B, in the type of `scores_B`.

    `groups_B` holds any integer per prompt. With `normalize_std` the distance from the group's mean is divided by the
    group's unbiased standard deviation, or by `least_std_B` where that is greater, plus `epsilon`; without (Dr.GRPO) it
    is left as it is. A group of one has nothing to be compared with: its advantage is 0.
    """
    scores = scores_B.double()  # Equal scores must give exactly 0 although epsilon is small.
    _, index_B, sizes_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    means_G = _sum_groups(scores, index_B, sizes_G) / sizes_G
    centred_B = scores - means_G[index_B]
    if normalize_std:
        variances_G = _sum_groups(centred_B.square(), index_B, sizes_G) / (sizes_G - 1).clamp(min=1)
        least_std_B = torch.as_tensor(least_std_B, dtype=torch.float64)
        centred_B = centred_B / (torch.maximum(variances_G.sqrt()[index_B], least_std_B) + epsilon)
    return centred_B.to(scores_B.dtype)


def std_floor(correct_B: Tensor, groups_B: Tensor, floor: float) -> Tensor:
    """least_std_B: `floor` in groups without a right answer, 0 elsewhere.

    The scores of such a group differ by penalties only, and a small standard deviation would blow them up to full size.
    """
    _, index_B, sizes_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    right_G = _sum_groups(correct_B.double(), index_B, sizes_G)
    return torch.where(right_G[index_B] > 0, 0.0, floor)


def entropy_shaped(advantages_T: Tensor, entropy_T: Tensor, coefficient: float, bound: float) -> Tensor:
    """Advantages_T raised where the policy is undecided: A + min(coefficient * H, |A| / bound).

    `entropy_T` (nats) is a plain number here: no gradient flows through it. The bound keeps the sign of A when it is
    above 1.
    """
    return advantages_T + torch.minimum(coefficient * entropy_T.detach(), advantages_T.abs() / bound)


def _sum_groups(values_B: Tensor, index_B: Tensor, sizes_G: Tensor) -> Tensor:
    return values_B.new_zeros(len(sizes_G)).index_add(0, index_B, values_B)
