"""The engines' side of a weight update: one engine rank's part of the weights, a group at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from meds_megatron.weights.resharding.boxes import TensorAssembly, checksum, checksum_key
from meds_megatron.weights.resharding.messages import Checksums, SyncSpec
from meds_megatron.weights.resharding.plan import Parcel
from meds_megatron.weights.resharding.transport import LocalTransport
from meds_megatron.weights.resharding.transport.network import Link


class WeightReceiver:
    """Receives what engine rank `engine_rank` needs, as Hugging Face tensors of full shape for vLLM's loaders."""

    def __init__(
        self,
        spec: SyncSpec,
        engine_rank: int,
        device: torch.device | str,
        local: LocalTransport,
        link: Link | None = None,
        senders: dict[tuple[int, int], int] | None = None,
    ):
        """`senders` are the members of `link` that send what is not staged on this node, by pipeline stage and
        tensor-parallel rank."""
        self._plan, self._dtype = spec.plan(), getattr(torch, spec.dtype)
        self._engine_rank, self._device = engine_rank, device
        self._local, self._link = local, link
        self._senders = senders or {}
        self.checksums: Checksums = {}
        """Of the last group that was received with checksums: of the tensors that vLLM's loaders then get."""

    def receive(
        self, group: int, handles: dict[tuple[int, int], Any], checksums: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of a group; only this rank's part of a tensor is filled.

        `handles` are the parcels staged on this node, by trainer rank and engine rank; the others come by the link.
        """
        assembly = TensorAssembly(self._plan, group, self._engine_rank, self._dtype, self._device)
        for parcel in assembly.parcels:
            handle = handles.get((parcel.trainer_rank, parcel.engine_rank))
            if handle is None:
                self._take_from_network(assembly, parcel)
            else:
                self._take_staged(assembly, parcel, handle)
        self.checksums = self._checksums(assembly) if checksums else {}
        return assembly.tensors()

    def _take_staged(self, assembly: TensorAssembly, parcel: Parcel, handle: Any) -> None:
        flat = self._local.open(handle)
        for box in parcel.boxes:
            values, flat = flat[: box.elements], flat[box.elements :]
            assembly.give(box, values.view(box.size))

    def _take_from_network(self, assembly: TensorAssembly, parcel: Parcel) -> None:
        sender = self._senders[self._plan.stage(parcel.group), parcel.trainer_rank]
        for box in parcel.boxes:
            place = assembly.place(box)
            if place.is_contiguous():
                self._link.receive(place, sender)
            else:
                values = torch.empty_like(place, memory_format=torch.contiguous_format)
                self._link.receive(values, sender)
                place.copy_(values)

    def _checksums(self, assembly: TensorAssembly) -> Checksums:
        return {
            checksum_key(box, parcel): checksum(assembly.place(box))
            for parcel in assembly.parcels
            for box in parcel.boxes
        }
