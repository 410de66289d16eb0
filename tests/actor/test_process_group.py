"""Process groups of the ranks: those that megatron-core makes have the run's timeout, and none is made for nothing."""

from datetime import timedelta

import pytest
import torch

from tests.devices import this_device

LAYOUTS = [(2, 1), (1, 2)]


def groups(rank: int, tensor: int, pipeline: int) -> tuple[set[timedelta], list[str]]:
    """Timeouts of all process groups but torch's default one, and names of megatron-core's gloo groups."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from meds_megatron.actor.process_group import form_groups
    from meds_megatron.config import ParallelConfig

    form_groups(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=0, timeout_minutes=7)
    made = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    timeouts = {group._get_backend(torch.device(this_device())).options._timeout for group in made}
    gloo = [name for name, value in vars(parallel_state).items() if name.endswith("_GLOO") and value is not None]
    return timeouts, gloo


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_every_group_has_the_configured_timeout_and_none_is_made_for_gloo_alone(ranks, tensor, pipeline):
    for timeouts, gloo in ranks.run(2, groups, tensor, pipeline):
        assert timeouts == {timedelta(minutes=7)}
        assert gloo == []
