"""Steps that all ranks take together and that fail on all when they fail on one."""

from collections.abc import Callable

import torch.distributed as dist

from meds_megatron.errors import UserError


def on_all_ranks(step: Callable[[], None], name: str) -> None:
    """Runs `step` on every rank and waits for all; where it fails on one, it fails on all.

    Raises what `step` raised, and on the other ranks a UserError: `name` failed, on which rank, and why.
    """
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = error
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise UserError(f"{name} failed on rank {rank}: {text}")
