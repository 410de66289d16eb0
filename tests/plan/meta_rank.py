"""A trainer rank of any layout in one process: real megatron-core on the meta device or the CPU, with torch's fake
process groups in place of the other ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Bytes:
    parameters: int
    """Bytes of the model's parameters, without padding."""
    weights: int
    """Bytes of the buffers of the parameters."""
    gradients: int
    optimizer: int
    """AdamW's state after a step, and float32 weights where they are copies."""


@contextmanager
def rank_of(parallel, ranks: int, rank: int) -> Iterator[None]:
    """megatron-core's groups as rank `rank` of `ranks` sees them."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from meds_megatron.actor.process_group import form_groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        form_groups(parallel, seed=0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def install(device: str) -> None:
    """Makes megatron-core allocate on `device`."""
    from meds_megatron.model import cpu_backend

    cpu_backend.install()
    torch.cuda.current_device = lambda: device


def rank_bytes(_rank: int, cases: list[tuple]) -> list[Bytes]:
    """Bytes of each (shape, parallel config, ranks, rank, dtype): what its model, DDP buffers and optimizer hold."""
    install("meta")
    dist.destroy_process_group()
    found = []
    for shape, parallel, ranks, rank, dtype in cases:
        with rank_of(parallel, ranks, rank), torch.device("meta"):
            found.append(_bytes(shape, parallel, dtype))
    return found


def _bytes(shape, parallel, dtype: str) -> Bytes:
    from meds_megatron.actor import optimizer
    from meds_megatron.config import ModelConfig, OptimizerConfig
    from meds_megatron.model.gpt import build_chunks, transformer_config

    config = transformer_config(shape, ModelConfig(dtype=dtype), parallel)
    chunks = build_chunks(shape, config, 4096)
    parameters = sum(p.nbytes for chunk in chunks for p in chunk.parameters())
    wrapped = optimizer.wrap(chunks)
    built = optimizer.build(wrapped, config, OptimizerConfig())
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers]
    return Bytes(
        parameters=parameters,
        weights=sum(buffer.param_data.nbytes for buffer in buffers),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=_optimizer_bytes(built, {buffer.param_data.untyped_storage()._cdata for buffer in buffers}),
    )


def _optimizer_bytes(built, weights: set[int]) -> int:
    """Bytes of all state after an AdamW step with real gradients' shapes; masters that are views of the weights are
    none."""
    total = 0
    for group in built.param_groups:
        for main in group["params"]:
            main.grad = torch.zeros_like(main)
            if main.untyped_storage()._cdata not in weights:
                total += main.nbytes
    for part in built.chained_optimizers:
        inner = part.optimizer
        inner.step()
        total += sum(v.nbytes for state in inner.state.values() for k, v in state.items() if k.startswith("exp_avg"))
    return total
