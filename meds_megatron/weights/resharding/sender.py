"""The trainer's side of a weight update: one rank's share of the weights, a group at a time."""

import torch
from torch import Tensor

from meds_megatron.weights.resharding.boxes import checksum, checksum_key
from meds_megatron.weights.resharding.messages import Checksums, Staged, SyncSpec
from meds_megatron.weights.resharding.plan import Box, Parcel
from meds_megatron.weights.resharding.transport import LocalTransport
from meds_megatron.weights.resharding.transport.network import Link


class WeightSender:
    """Sends the share of the trainer's rank `rank` (`trainer_rank` of its tensor-parallel group)."""

    def __init__(
        self, spec: SyncSpec, rank: int, trainer_rank: int, parameters: dict[str, Tensor], local: LocalTransport
    ):
        """`parameters` are the rank's own by the names of their entries; what they hold when it is sent counts."""
        self._plan, self._dtype = spec.plan(), getattr(torch, spec.dtype)
        self._rank, self._trainer_rank = rank, trainer_rank
        self._parameters = parameters
        self._local = local
        self._links: dict[int, Link] = {}
        self._staged: dict[int, Staged] = {}

    def connect(self, engine: int, link: Link) -> None:
        """From now on `send` reaches the engine through `link`."""
        self._links[engine] = link

    def stage(self, group: int, checksums: bool) -> Staged:
        """Lays the rank's parcels of the group ready for every engine of this node, until `release`.

        Raises UserError when there is no room.
        """
        staged = self._staged[group] = Staged()
        for parcel in self._parcels(group):
            boxes = [self._cut(box) for box in parcel.boxes]
            name = f"group{group:04d}-rank{self._rank:05d}-to{parcel.engine_rank:03d}"
            place = self._trainer_rank, parcel.engine_rank
            staged.handles[place] = self._local.put(name, boxes, self._dtype)
            if checksums:
                staged.checksums |= self._checksums(parcel)
        return staged

    def release(self, group: int) -> None:
        """Gives the staged parcels' memory back."""
        for handle in self._staged.pop(group).handles.values():
            self._local.drop(handle)

    def send(self, group: int, engine: int, checksums: bool) -> Checksums:
        """Sends the rank's parcels of the group to one engine over the network.

        Raises ConnectionError when the engine is gone; it then stays so until it is connected again.
        """
        link, sums = self._links.get(engine), {}
        if link is None:
            raise ConnectionError(f"engine {engine} is not connected")
        for parcel in self._parcels(group):
            for box in parcel.boxes:
                try:
                    link.send(self._cut(box).to(self._dtype), link.receiver(parcel.engine_rank))
                except ConnectionError:
                    # Without its link, whatever of the engine still waits for the rest hears that nothing comes.
                    del self._links[engine]
                    raise
            if checksums:
                sums |= self._checksums(parcel)
        return sums

    def _parcels(self, group: int) -> list[Parcel]:
        return [parcel for parcel in self._plan.parcels(group) if parcel.trainer_rank == self._trainer_rank]

    def _cut(self, box: Box) -> Tensor:
        """A view of the parameter, not a copy."""
        return self._parameters[box.entry].detach()[box.local_slices()]

    def _checksums(self, parcel: Parcel) -> Checksums:
        return {checksum_key(box, parcel): checksum(self._cut(box).to(self._dtype)) for box in parcel.boxes}
