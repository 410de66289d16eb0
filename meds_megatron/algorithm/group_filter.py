"""Dynamic sampling: groups without a spread give no gradient (DAPO, arXiv 2503.14476, section 3.2)."""

import torch
from torch import Tensor


def keep_groups(metric_B: Tensor, groups_B: Tensor) -> Tensor:
    """keep_B (bool): whether the group of a response has a spread in `metric_B`.

    `groups_B` holds any integer per prompt; all responses of a group share one value. A group of one is kept, as
    in DAPO.
    """
    _, index_B, sizes_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    metric_B = metric_B.double()
    empty_G = metric_B.new_zeros(len(sizes_G))
    highest_G = empty_G.scatter_reduce(0, index_B, metric_B, "amax", include_self=False)
    lowest_G = empty_G.scatter_reduce(0, index_B, metric_B, "amin", include_self=False)
    return ((highest_G > lowest_G) | (sizes_G == 1))[index_B]
