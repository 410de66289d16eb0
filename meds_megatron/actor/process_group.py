"""Joins this process to the others of a run: torch.distributed, megatron-core's groups and its random states."""

from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from meds_megatron.actor.messages import Rendezvous
from meds_megatron.config import ParallelConfig
from meds_megatron.model import cpu_backend


def open_store(host: str, world_size: int) -> dist.TCPStore:
    """The store that rank 0 keeps for the others, on a port that the system picks."""
    return dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)


def join(rendezvous: Rendezvous, store: dist.TCPStore | None = None) -> str:
    """Initialises torch.distributed (NCCL on a GPU, gloo without) and returns the device this rank computes on.

    `store` is rank 0's own; the other ranks connect to it by the rendezvous.
    """
    cpu_backend.install()
    on_gpu = torch.cuda.is_available()
    if store is None:
        store = dist.TCPStore(rendezvous.host, rendezvous.port, rendezvous.world_size, is_master=False)
    dist.init_process_group(
        backend="nccl" if on_gpu else "gloo",
        store=store,
        rank=rendezvous.rank,
        world_size=rendezvous.world_size,
        timeout=timedelta(minutes=rendezvous.timeout_minutes),
    )
    if not on_gpu:
        return "cpu"
    torch.cuda.set_device(0)
    return "cuda"


def form_groups(parallel: ParallelConfig, seed: int) -> None:
    """Makes megatron-core's tensor-, pipeline- and data-parallel groups; every rank calls it together."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        create_gloo_process_groups=torch.cuda.is_available(),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def speaks_for_model_replica() -> bool:
    """True on the one rank of each data-parallel replica that hands results to the driver: last stage, first shard."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True) and (
        parallel_state.get_tensor_model_parallel_rank() == 0
    )
