"""Weights through the shared memory of a node: a file a parcel, written by a trainer rank and mapped by engine ranks.

The twin of CUDA IPC for processes that compute on the CPU.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meds_megatron.errors import UserError

ROOT = Path("/dev/shm")


@dataclass(frozen=True)
class SharedFile:
    path: str
    elements: int
    dtype: torch.dtype


class SharedMemory:
    """Files in a directory of the node's shared memory, made where it is missing."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)

    def put(self, name: str, boxes: list[Tensor], dtype: torch.dtype) -> SharedFile:
        """Raises UserError when the shared memory is full or cannot be written to."""
        elements = sum(prod(box.shape) for box in boxes)
        path = self._directory / name
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            _reserve(path, elements * dtype.itemsize)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path}: no room for the engines' weights ({error.strerror}); give the machine, or its container, "
                "shared memory for a copy of the model's embedding and some layers, for each data-parallel replica"
            ) from error
        file = SharedFile(str(path), elements, dtype)
        flat = self.open(file)
        offset = 0
        for box in boxes:
            flat[offset : offset + box.numel()].view(box.shape).copy_(box)
            offset += box.numel()
        return file

    def open(self, handle: SharedFile) -> Tensor:
        return torch.from_file(handle.path, shared=True, size=handle.elements, dtype=handle.dtype)

    def drop(self, handle: SharedFile) -> None:
        Path(handle.path).unlink(missing_ok=True)


def _reserve(path: Path, size: int) -> None:
    """Makes the file with all its memory: a page that is missing when it is written to would kill the process."""
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    finally:
        os.close(descriptor)
