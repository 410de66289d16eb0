"""How boxes of weights get from a trainer rank to an engine rank.

Through the memory of a node they share (`shared_memory` on CPU, `cuda_ipc` on GPUs), or over the network (`network`,
with gloo or NCCL). The plan says what goes where; a transport only moves it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class LocalTransport(Protocol):
    """Memory of one node that a writer fills and readers map."""

    def put(self, name: str, boxes: list[Tensor], dtype: torch.dtype) -> Any:
        """Lays the boxes flat behind one another, as `dtype`, and returns a handle that can be sent to the readers."""

    def open(self, handle: Any) -> Tensor:
        """What the handle stands for, flat; it stays valid when the writer drops it."""

    def drop(self, handle: Any) -> None:
        """The writer gives the memory back as soon as no reader has it open."""


def local_transport(device: str, directory: str) -> LocalTransport:
    """The transport between processes of a node that compute on `device`; `directory` is for files in its memory."""
    if device == "cpu":
        from meds_megatron.weights.resharding.transport.shared_memory import SharedMemory

        return SharedMemory(directory)
    from meds_megatron.weights.resharding.transport.cuda_ipc import CudaIpc

    return CudaIpc()
