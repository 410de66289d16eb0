"""Dynamic sampling: groups without a spread give no gradient (DAPO, arXiv 2503.14476, section 3.2)."""

import torch
from torch import Tensor


def keep_groups(metric_B: Tensor, groups_B: Tensor, counted_B: Tensor | None = None) -> Tensor:
    """keep_B (bool): whether the group of a response has a spread in `metric_B`.

    `groups_B` holds any integer per prompt; all responses of a group share one value. Responses that `counted_B` (bool;
    default all) leaves out have no metric, a group without any other is dropped. A group of one is kept, as in DAPO.
    """
    _, index_B, sizes_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    counted_B = torch.ones_like(groups_B, dtype=torch.bool) if counted_B is None else counted_B
    metric_B, index_N = metric_B.double()[counted_B], index_B[counted_B]
    highest_G = metric_B.new_full((len(sizes_G),), -torch.inf).scatter_reduce(0, index_N, metric_B, "amax")
    lowest_G = metric_B.new_full((len(sizes_G),), torch.inf).scatter_reduce(0, index_N, metric_B, "amin")
    return ((highest_G > lowest_G) | ((sizes_G == 1) & highest_G.isfinite()))[index_B]
