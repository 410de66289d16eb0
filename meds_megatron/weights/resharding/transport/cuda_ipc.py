"""Weights between processes that share a node's GPUs: CUDA IPC handles of a trainer rank's staging memory.

Every process of a run sees all GPUs of its node, its own first, so that a handle can be opened whichever GPU it is of.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

# Place of the device index among the arguments of torch's `rebuild_cuda_tensor`.
_DEVICE_ARGUMENT = 6


@dataclass(frozen=True)
class GpuMemory:
    name: str
    gpu: str
    """UUID: indices differ from process to process."""
    arguments: tuple[Any, ...]
    """Of torch's `rebuild_cuda_tensor`."""


class CudaIpc:
    """Staging memory on the writer's GPU, which the writer keeps until it is dropped."""

    def __init__(self) -> None:
        self._staged: dict[str, Tensor] = {}

    def put(self, name: str, boxes: list[Tensor], dtype: torch.dtype) -> GpuMemory:
        flat = torch.cat([box.to(dtype).flatten() for box in boxes])
        # Readers do not know this process's stream.
        torch.cuda.synchronize(flat.device)
        self._staged[name] = flat
        _, arguments = reduce_tensor(flat)
        return GpuMemory(name, _uuid(flat.device.index), arguments)

    def open(self, handle: GpuMemory) -> Tensor:
        """A copy on this process's own GPU."""
        arguments = list(handle.arguments)
        arguments[_DEVICE_ARGUMENT] = _index_of(handle.gpu)
        return rebuild_cuda_tensor(*arguments).to(torch.cuda.current_device(), copy=True)

    def drop(self, handle: GpuMemory) -> None:
        self._staged.pop(handle.name, None)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _index_of(uuid: str) -> int:
    for index in range(torch.cuda.device_count()):
        if _uuid(index) == uuid:
            return index
    raise RuntimeError(f"GPU {uuid}, which holds weights for this engine, is not visible to it")
