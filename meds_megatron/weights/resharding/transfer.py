"""Both ends of a weight update: `WeightSender` on a trainer rank, `WeightReceiver` on an engine rank.

For each bucket of the plan, a trainer rank on the engine's node stages its transfers in the node's memory, where the
engine rank reads them; a trainer rank on another node sends them through the engine's transfer group. The engine rank
assembles Hugging Face tensors of full shape, of which only its own part is filled, for vLLM's weight loaders.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from meds_megatron.shared_memory import remove_unclaimed
from meds_megatron.weights.resharding.plan import Transfer
from meds_megatron.weights.resharding.staging import staging_elements
from meds_megatron.weights.resharding.transport import TransferGroup, local_transport, open_rendezvous
from meds_megatron.weights.resharding.types import Checksums, Rendezvous, StagedBucket, SyncSpec
from meds_megatron.weights.sealed_store import SealedStore
from meds_megatron.weights.table import TensorSlice

logger = logging.getLogger(__name__)

MOST_NAMED = 5
_BLOCK_ELEMENTS = 2**20
_CHECKSUM_PERIOD = 65521


class WeightSender:
    """The sending end on trainer rank `rank`, which serves engines with its share of the weights.

    Loss of an engine is logged, not raised: the driver sees it at the engine itself.
    """

    def __init__(self, spec: SyncSpec, rank: int, parameters: dict[str, Tensor], device: str, host: str):
        """`parameters` are the rank's own by Megatron name (`weights.chunks.rank_parameters`); their values are read
        when a bucket is staged or sent. `host` is this machine's address for other nodes."""
        self._plan, self._dtype = spec.plan(), getattr(torch, spec.dtype)
        place = spec.layout.coordinates(rank)
        self._rank, self._trainer_rank = rank, place.tensor
        self._parameters, self._device, self._host = parameters, device, host
        self._directory = spec.directory
        elements = staging_elements(self._plan, place.pipeline, place.tensor)
        self._local = local_transport(device, spec.directory, elements)
        self._stores: dict[int, SealedStore] = {}
        self._staged: dict[int, StagedBucket] = {}
        self.groups: dict[int, TransferGroup] = {}
        """Transfer groups by engine."""

    def open_group(self, engine: int, senders: int, receivers: int) -> Rendezvous:
        """Opens the rendezvous of a new transfer group for an engine, on this machine."""
        rendezvous, self._stores[engine] = open_rendezvous(self._host, senders, receivers)
        return rendezvous

    def join_group(self, engine: int, rendezvous: Rendezvous, member: int) -> bool:
        """Joins an engine's transfer group as `member`; False when the engine does not join."""
        store = self._stores.pop(engine, None)
        try:
            self.groups[engine] = TransferGroup(rendezvous, member, self._device, store)
        except ConnectionError as error:
            logger.warning("engine %d did not connect: %s", engine, error)
            return False
        return True

    def stage_bucket(self, bucket: int, checksums: bool) -> StagedBucket:
        """Writes the rank's transfers of the bucket into the node's memory, where they stay until `release_bucket`.

        Raises UserError when the memory does not suffice.
        """
        staged = self._staged[bucket] = StagedBucket()
        for transfer in self._transfers(bucket):
            parts = [self._values(part) for part in transfer.slices]
            name = f"bucket{bucket:04d}-rank{self._rank:05d}-to{transfer.engine_rank:03d}"
            staged.handles[self._trainer_rank, transfer.engine_rank] = self._local.put(name, parts, self._dtype)
            if checksums:
                staged.checksums.update(self._checksums(transfer))
        return staged

    def release_bucket(self, bucket: int) -> None:
        """Frees the memory of a staged bucket."""
        for handle in self._staged.pop(bucket).handles.values():
            self._local.drop(handle)

    def send(self, bucket: int, engine: int, checksums: bool) -> Checksums:
        """Sends the rank's transfers of the bucket to an engine over the network and returns their checksums.

        Returns none without `checksums`, and none when the engine is gone, until it has joined a new group.
        """
        group = self.groups.get(engine)
        sums: Checksums = {}
        if group is None:
            logger.warning("bucket %d is not sent to engine %d: it is not connected", bucket, engine)
            return {}
        try:
            for transfer in self._transfers(bucket):
                for part in transfer.slices:
                    group.send(self._values(part).to(self._dtype), transfer.engine_rank)
                if checksums:
                    sums |= self._checksums(transfer)
        except ConnectionError as error:
            # Leaving the group also fails the engine's ranks that still wait for the rest of the bucket.
            self.groups.pop(engine).abort()
            logger.warning("engine %d is lost while bucket %d is sent: %s", engine, bucket, error)
            return {}
        return sums

    def close(self) -> None:
        """Leaves all groups and removes from this node what the run and killed processes have in shared memory."""
        while self.groups:
            self.groups.popitem()[1].abort()
        shutil.rmtree(self._directory, ignore_errors=True)
        remove_unclaimed()

    def _transfers(self, bucket: int) -> list[Transfer]:
        return [transfer for transfer in self._plan.transfers(bucket) if transfer.trainer_rank == self._trainer_rank]

    def _values(self, part: TensorSlice) -> Tensor:
        """A view of the parameter, not a copy."""
        return self._parameters[part.parameter].detach()[part.local_slices()]

    def _checksums(self, transfer: Transfer) -> Checksums:
        return {_key(part, transfer): checksum(self._values(part).to(self._dtype)) for part in transfer.slices}


class WeightReceiver:
    """The receiving end on engine rank `engine_rank`."""

    def __init__(
        self,
        spec: SyncSpec,
        engine_rank: int,
        device: torch.device | str,
        group: TransferGroup | None = None,
        senders: dict[tuple[int, int], int] | None = None,
    ):
        """`senders` are the members of `group` that send the weights not staged on this node, by pipeline stage and
        tensor-parallel rank."""
        self._plan, self._dtype = spec.plan(), getattr(torch, spec.dtype)
        self._engine_rank, self._device = engine_rank, device
        self._local = local_transport(device, spec.directory)
        self._group, self._senders = group, senders or {}
        self.checksums: Checksums = {}
        """Checksums of the last bucket, where requested, computed from the tensors that vLLM loads."""

    def receive(
        self, bucket: int, handles: dict[tuple[int, int], Any], checksums: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a bucket; each tensor is dropped when the next one is requested.

        A vLLM loader narrows a tensor of full shape to its rank's part, so only that part is filled: on a CPU the rest
        is address space that is never touched, on a GPU scratch memory of at most one bucket. `handles` are the
        transfers staged on this node, by trainer rank and engine rank; the others arrive through the group.
        """
        shapes = self._plan.hf_shapes(bucket)
        tensors: dict[str, Tensor] = {}

        def target(part: TensorSlice) -> Tensor:
            if part.hf_name not in tensors:
                tensors[part.hf_name] = self._empty(shapes[part.hf_name])
            return tensors[part.hf_name][part.hf_slices()]

        transfers = [t for t in self._plan.transfers(bucket) if t.engine_rank == self._engine_rank]
        for transfer in transfers:
            handle = handles.get((transfer.trainer_rank, self._engine_rank))
            if handle is None:
                for part in transfer.slices:
                    self._receive_into(target(part), transfer)
                continue
            staged = self._local.open(handle).split([part.elements for part in transfer.slices])
            for part, values in zip(transfer.slices, staged, strict=True):
                if part.size == shapes[part.hf_name]:
                    # A tensor that arrives whole in one slice is used as it is.
                    tensors[part.hf_name] = values.view(part.size)
                else:
                    target(part).copy_(values.view(part.size))
        self.checksums = {_key(p, t): checksum(target(p)) for t in transfers for p in t.slices} if checksums else {}
        # A rank whose part of a tensor is padding alone gets the tensor with no part filled.
        return ((name, tensors.pop(name) if name in tensors else self._empty(s)) for name, s in shapes.items())

    def _receive_into(self, target: Tensor, transfer: Transfer) -> None:
        values = target if target.is_contiguous() else target.new_empty(target.shape)
        assert self._group is not None
        self._group.receive(values, self._senders[self._plan.pipeline_stage(transfer.bucket), transfer.trainer_rank])
        if values is not target:
            target.copy_(values)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


class CompletenessCheck:
    """Checks that one weight update holds each of the `expected` parameters exactly once."""

    def __init__(self, expected: Iterable[str]):
        self._missing = set(expected)
        self._received: set[str] = set()

    def add(self, name: str) -> None:
        """Records a parameter. Raises ValueError when it is a repeated one or not of the model."""
        if name in self._received:
            raise ValueError(f"{name} is twice in one weight update")
        if name not in self._missing:
            raise ValueError(f"{name} is in a weight update, and the model has no such parameter")
        self._missing.remove(name)
        self._received.add(name)

    def finish(self) -> None:
        """Raises ValueError, naming them, when parameters are missing."""
        if self._missing:
            names = sorted(self._missing)
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise ValueError(f"the weight update lacks {', '.join(names[:MOST_NAMED])}{more}")


def checksum(values: Tensor) -> int:
    """A number that differs between both ends when a value or the order of values does.

    The bits of each element as an integer, weighted by position, summed modulo 2^64: the same on any device.
    """
    flat = values.contiguous().flatten()
    bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
    total = 0
    for first in range(0, len(bits), _BLOCK_ELEMENTS):
        block = bits[first : first + _BLOCK_ELEMENTS].long()
        positions = torch.arange(first, first + len(block), device=block.device)
        total += int((block * (positions % _CHECKSUM_PERIOD + 1)).sum())
    return total % 2**64


def _key(part: TensorSlice, transfer: Transfer) -> tuple[str, tuple[int, ...], int]:
    return part.hf_name, part.hf_start, transfer.engine_rank
