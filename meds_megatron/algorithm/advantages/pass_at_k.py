"""Advantages of pass@k training (arXiv 2508.10751), in their closed form."""

import torch
from torch import Tensor

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput, sum_groups
from meds_megatron.config import AdvantageConfig


def pass_at_k(inputs: AdvantageInputs, config: AdvantageConfig) -> AdvantageOutput:
    """A response's mean advantage over all subsets of k = `pass_k` responses of its group that it belongs to, where the
    reward of a subset is 1 if any of its responses is right.

    Of n responses with w wrong ones, a subset's reward has mean m = 1 - C(w, k) / C(n, k) and deviation
    s = sqrt(m (1 - m)). A right response has (1 - m) / (s + epsilon), a wrong one
    (1 - m - C(w - 1, k - 1) / C(n - 1, k - 1)) / (s + epsilon). Formulas as in the authors' repository
    (RUCAIBox/Passk_Training, README.md and code/passk_adv.py). Only `correct_B` counts: penalties have no effect. In a
    group of fewer than k responses k is their number.
    """
    _, index_B, sizes_G = torch.unique(inputs.groups_B, return_inverse=True, return_counts=True)
    wrong_G = sum_groups((~inputs.correct_B.bool()).double(), index_B, len(sizes_G))
    sizes_G = sizes_G.double()
    k_G = sizes_G.clamp(max=config.pass_k)
    all_wrong_G = _chosen_share(wrong_G, sizes_G, k_G)
    others_wrong_G = _chosen_share(wrong_G - 1, sizes_G - 1, k_G - 1)
    scale_G = (all_wrong_G * (1 - all_wrong_G)).sqrt() + config.epsilon
    right_G, wrong_G = all_wrong_G / scale_G, (all_wrong_G - others_wrong_G) / scale_G
    advantages_B = torch.where(inputs.correct_B.bool(), right_G[index_B], wrong_G[index_B])
    return AdvantageOutput(advantages_B.to(inputs.scores_B.dtype))


def _chosen_share(some_G: Tensor, all_G: Tensor, k_G: Tensor) -> Tensor:
    """C(some, k) / C(all, k), the share of subsets of k that lie in `some`; 0 where k is more than `some`."""

    def log_choose(n_G: Tensor) -> Tensor:
        return torch.lgamma(n_G + 1) - torch.lgamma(k_G + 1) - torch.lgamma(n_G - k_G + 1)

    fits_G = some_G >= k_G
    share_G = (log_choose(torch.where(fits_G, some_G, all_G)) - log_choose(all_G)).exp()
    return torch.where(fits_G, share_G, 0.0)
