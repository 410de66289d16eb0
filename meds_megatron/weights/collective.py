"""Steps that all ranks take together and that fail on all when they fail on one."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from meds_megatron.errors import UserError

LONGEST_TEXT = 4096
_NONE = -1
"""Length that stands for no text."""


def on_all_ranks(step: Callable[[], None], name: str) -> None:
    """Runs `step` on every rank and waits for all; where it fails on one, it fails on all.

    Raises what `step` raised, and on the other ranks a UserError: `name` failed, on which rank, and why.
    """
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = error
    failures = gather_texts(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise UserError(f"{name} failed on rank {rank}: {text}")


def gather_texts(text: str | None) -> list[str | None]:
    """The texts of all ranks, cut after LONGEST_TEXT bytes. They are sent as tensors: torch gathers objects as pickles,
    which can run anything."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    content = b"" if text is None else text.encode()[:LONGEST_TEXT]
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([_NONE if text is None else len(content)], device=device))
    sizes = [min(int(length), LONGEST_TEXT) for length in lengths]
    if max(sizes) <= 0:
        return ["" if size == 0 else None for size in sizes]
    padded = torch.frombuffer(bytearray(content.ljust(max(sizes), b"\0")), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [
        None if size == _NONE else bytes(part[:size].tolist()).decode(errors="replace")
        for size, part in zip(sizes, parts, strict=True)
    ]
