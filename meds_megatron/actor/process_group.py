"""torch.distributed, megatron-core's process groups and its random states in this process."""

import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from meds_megatron.config import ParallelConfig
from meds_megatron.model import cpu_backend
from meds_megatron.weights.membership import check_members
from meds_megatron.weights.sealed_store import SealedStore
from meds_megatron.weights.store import JOIN_LIMIT, connect, wait_for_members
from meds_megatron.weights.store_address import StoreAddress

_store: SealedStore | None = None
"""Store of this process's groups, which keep only its C++ part."""


def join(
    address: StoreAddress,
    rank: int,
    world_size: int,
    timeout_minutes: int = 30,
    store: SealedStore | None = None,
    limit: timedelta = JOIN_LIMIT,
) -> str:
    """Initialises torch.distributed (NCCL on a GPU, gloo without) and returns the device this rank computes on.

    `store` is rank 0's own; the other ranks connect to it at `address`. Raises UserError when not all ranks do within
    `limit`, and when one of them does not know the store's secret.
    """
    global _store
    cpu_backend.install()
    on_gpu = torch.cuda.is_available()
    _store = store or connect(address, world_size)
    wait_for_members(_store, rank, world_size, limit)
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        store=_store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    if not on_gpu:
        check_members(dist.group.WORLD, _store, limit)
        return "cpu"
    torch.cuda.set_device(0)
    return "cuda"


def form_groups(parallel: ParallelConfig, seed: int, timeout_minutes: int = 30) -> None:
    """Makes megatron-core's tensor-, context-, pipeline- and data-parallel groups and seeds all random generators; all
    ranks call it together. `timeout_minutes` is that of a collective of these groups; torch keeps one a group."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        distributed_timeout_minutes=timeout_minutes,
        # Megatron's own checkpoints of the optimizer use them; ours do not (`actor.optimizer_state`).
        create_gloo_process_groups=False,
    )
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and dist.get_backend(group) == "gloo" and _store is not None:
            check_members(group, _store)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def is_replica_output_rank() -> bool:
    """Whether this rank returns its replica's results to the driver: last pipeline stage, first tensor- and
    context-parallel rank."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )
