"""Transports of weights from a trainer rank to an engine rank. The plan decides which slice goes where.

Within a node: files in shared memory between processes on the CPU (`SharedMemory`), CUDA IPC handles of a trainer
rank's GPU memory between GPUs (`CudaIpc`). Between nodes: a process group (`TransferGroup`), gloo on the CPU, NCCL on
GPUs.
"""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from meds_megatron.errors import UserError
from meds_megatron.shared_memory import claim, remove_unclaimed
from meds_megatron.weights.membership import check_members
from meds_megatron.weights.resharding.staging import BlockAllocator
from meds_megatron.weights.resharding.types import Rendezvous
from meds_megatron.weights.sealed_store import SealedStore
from meds_megatron.weights.store import connect, open_store, wait_for_members

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=5)
"""Time for the members of a transfer group to join, and for one message."""

# Places among the arguments of torch's `rebuild_cuda_tensor`.
_DEVICE_ARGUMENT, _EVENT_ARGUMENT = 6, 14


class LocalTransport(Protocol):
    """Memory of one node that one process writes and others map."""

    def put(self, name: str, parts: list[Tensor], dtype: torch.dtype) -> Any:
        """Writes the parts flat, one after another, as `dtype`; returns a picklable handle for the readers."""

    def open(self, handle: Any) -> Tensor:
        """The flat values behind a handle; they stay valid after the writer's `drop`."""

    def drop(self, handle: Any) -> None:
        """Frees the memory as soon as no reader has it open. Called by the writer."""


def local_transport(device: torch.device | str, directory: str, elements: int = 0) -> LocalTransport:
    """The transport between processes of one node that compute on `device`; a writer never has more than `elements`
    (`staging_elements`) under way."""
    return SharedMemory(directory) if torch.device(device).type == "cpu" else CudaIpc(elements)


@dataclass(frozen=True)
class SharedFile:
    path: str
    elements: int
    dtype: torch.dtype


class SharedMemory:
    """Files in a directory of the node's shared memory. A writer creates it where it is missing, after it has removed
    those of killed processes."""

    def __init__(self, directory: str | Path):
        self._directory = Path(directory)
        self._claim: int | None = None

    def put(self, name: str, parts: list[Tensor], dtype: torch.dtype) -> SharedFile:
        """Raises UserError when the shared memory is full or cannot be written to."""
        path = self._directory / name
        file = SharedFile(str(path), sum(part.numel() for part in parts), dtype)
        try:
            if self._claim is None:
                for left_over in remove_unclaimed(self._directory.parent):
                    logger.info("removed %s, which a killed process left", left_over)
                self._claim = claim(self._directory)
            _allocate(path, file.elements * dtype.itemsize)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path}: no memory for the engines' weights ({error.strerror}); give the machine, or its container, "
                "shared memory for a copy of the model's embedding and some layers, for each data-parallel replica"
            ) from error
        for values, part in zip(self.open(file).split([part.numel() for part in parts]), parts, strict=True):
            values.view(part.shape).copy_(part)
        return file

    def open(self, handle: SharedFile) -> Tensor:
        return torch.from_file(handle.path, shared=True, size=handle.elements, dtype=handle.dtype)

    def drop(self, handle: SharedFile) -> None:
        Path(handle.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class ExportedBlock:
    """GPU memory that other processes of the node can open."""

    name: str
    """Unique on the node."""
    gpu: str
    """UUID: device indices differ from process to process."""
    arguments: tuple[Any, ...]
    """Arguments of torch's `rebuild_cuda_tensor`."""


@dataclass(frozen=True)
class GpuMemory:
    block: ExportedBlock
    begin: int
    elements: int


class CudaIpc:
    """One block of the writer's GPU memory, in which it stages all updates of the engines.

    torch counts the readers of an export so that it can free the memory: one export is for one reader, which must open
    it, or the memory is never free again. The block therefore lives as long as the writer, is exported once, and every
    reader opens it once and keeps it: nothing depends on what readers do, also when one dies.

    Every process of a run sees all GPUs of its node, its own first, so it can open a block of any of them.
    """

    def __init__(self, elements: int = 0) -> None:
        """`elements` is the size of the block, which is allocated when it is first used; 0 for a reader."""
        self._elements = elements
        self._allocator = BlockAllocator()
        self._block: Tensor | None = None
        self._exported: ExportedBlock | None = None
        self._opened: dict[str, Tensor] = {}

    def put(self, name: str, parts: list[Tensor], dtype: torch.dtype) -> GpuMemory:
        """Raises RuntimeError when the block is too small."""
        if self._block is None or self._exported is None:
            self._block = torch.empty(self._elements, dtype=dtype, device=parts[0].device)
            _, arguments = reduce_tensor(self._block)
            self._exported = ExportedBlock(secrets.token_hex(8), _uuid(self._block.device.index), arguments)
        elements = sum(part.numel() for part in parts)
        begin = self._allocator.take(elements)
        if begin + elements > self._elements:
            raise RuntimeError(f"{name} does not fit the {self._elements} elements for staged weights")
        staged = self._block[begin : begin + elements].split([part.numel() for part in parts])
        for values, part in zip(staged, parts, strict=True):
            values.view(part.shape).copy_(part)
        # Readers do not wait for this process's stream.
        torch.cuda.synchronize()
        return GpuMemory(self._exported, begin, elements)

    def open(self, handle: GpuMemory) -> Tensor:
        """A copy on this process's own GPU. Raises RuntimeError when the writer's GPU is not visible here."""
        block = self._opened.get(handle.block.name)
        if block is None:
            block = self._opened[handle.block.name] = _open_block(handle.block)
        return block[handle.begin : handle.begin + handle.elements].to(torch.cuda.current_device(), copy=True)

    def drop(self, handle: GpuMemory) -> None:
        self._allocator.give_back(handle.begin)


class TransferGroup:
    """A process group of one engine's ranks and of the trainer ranks that serve it over the network.

    It is separate from torch's default group, which vLLM and Megatron each use themselves, and every engine has its
    own: one that fails breaks no other's. With gloo a member fails at once when another is gone, with NCCL when a
    message has taken TIMEOUT.
    """

    def __init__(self, rendezvous: Rendezvous, member: int, device: str, store: SealedStore | None = None):
        """Joins as `member` and returns when every sender has reached every engine rank. `store` is that of
        `open_rendezvous`, in the process that opened it.

        Raises ConnectionError when a member does not join in time, or a stranger in its place.
        """
        self._senders = rendezvous.senders
        self.sent_bytes = 0
        try:
            self._store = store or connect(rendezvous.store, rendezvous.members)
            wait_for_members(self._store, member, rendezvous.members, TIMEOUT)
            self._group = _process_group(self._store, member, rendezvous.members, device)
        except (RuntimeError, UserError) as error:
            raise ConnectionError(f"not all members of a transfer group joined: {error}") from error
        try:
            if device == "cpu":
                check_members(self._group, self._store, TIMEOUT)
            self._meet(member, rendezvous, device)
        except (ConnectionError, UserError) as error:
            self.abort()
            raise ConnectionError(str(error)) from error

    def _meet(self, member: int, rendezvous: Rendezvous, device: str) -> None:
        """One element from each sender to each engine rank: NCCL connects two members in their first message, where it
        would otherwise wait in the middle of an update."""
        element = torch.zeros(1, device=device)
        if member < rendezvous.senders:
            for engine_rank in range(rendezvous.receivers):
                self.send(element, engine_rank)
        else:
            for sender in range(rendezvous.senders):
                self.receive(element, sender)
        self.sent_bytes = 0

    def send(self, values: Tensor, engine_rank: int) -> None:
        """Returns when `values` may be overwritten. Raises ConnectionError when the engine is gone."""
        values = values.contiguous()
        try:
            self._group.send([values], self._senders + engine_rank, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(f"rank {engine_rank} of the engine is gone: {error}") from error
        self.sent_bytes += values.nbytes

    def receive(self, target: Tensor, sender: int) -> None:
        """Fills `target`, which must be contiguous. Raises ConnectionError when the sender is gone."""
        try:
            self._group.recv([target], sender, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(f"member {sender} of the transfer group is gone: {error}") from error

    def abort(self) -> None:
        """Leaves the group, which fails what others still wait for from this member. The process continues."""
        if isinstance(self._group, dist.ProcessGroupGloo):
            # gloo closes its connections with the group.
            del self._group
        else:
            self._group.abort()


def open_rendezvous(host: str, senders: int, receivers: int) -> tuple[Rendezvous, SealedStore]:
    """A rendezvous at a free port of this machine; it exists as long as the returned store is kept."""
    store = open_store(host, senders + receivers)
    return Rendezvous(store.address, senders, receivers), store


def _process_group(store: SealedStore, member: int, members: int, device: str) -> Any:
    """A group of torch's classes for gloo or NCCL, whose types lack their methods."""
    if device == "cpu":
        return dist.ProcessGroupGloo(store, member, members, TIMEOUT)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    with _variables(NCCL_RAISES):
        return dist.ProcessGroupNCCL(store, member, members, options)


NCCL_RAISES = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
"""Read by a `ProcessGroupNCCL` when it is made: waiting for a message then lasts until it has arrived and raises after
the timeout. Otherwise torch ends the process when another member is gone."""


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables of this process, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _allocate(path: Path, size: int) -> None:
    """Creates the file with all its memory: writing to a page that cannot be allocated would kill the process."""
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    finally:
        os.close(descriptor)


def _open_block(block: ExportedBlock) -> Tensor:
    """The block in this process's address space.

    This process's own GPU maps it where it can read the writer's memory: a context on the writer's GPU would take half
    a GiB there for each reader.
    """
    own, arguments = torch.cuda.current_device(), list(block.arguments)
    writer = _device_index(block.gpu)
    direct = writer == own or torch.cuda.can_device_access_peer(own, writer)
    arguments[_DEVICE_ARGUMENT] = own if direct else writer
    # The writer has synchronized, and its event belongs to its own GPU.
    arguments[_EVENT_ARGUMENT] = False
    return rebuild_cuda_tensor(*arguments)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _device_index(uuid: str) -> int:
    for index in range(torch.cuda.device_count()):
        if _uuid(index) == uuid:
            return index
    raise RuntimeError(f"GPU {uuid}, which holds weights for this engine, is not visible to it")
