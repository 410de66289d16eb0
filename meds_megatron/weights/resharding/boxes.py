"""Boxes of tensors as an engine rank receives them: put together to whole tensors, and summed up to be compared."""

from collections.abc import Iterator

import torch
from torch import Tensor

from meds_megatron.weights.resharding.plan import Box, Parcel, ReshardPlan

_CHUNK_ELEMENTS = 2**20
_CHECKSUM_PERIOD = 65521


class TensorAssembly:
    """Puts the boxes of one group that an engine rank receives together to the tensors that vLLM's loaders take.

    A loader narrows a tensor of full shape to its rank's part, so only that part is ever filled: on a CPU the rest of
    the tensor is address space that is not touched, on a GPU scratch memory, of no more than the group together.
    """

    def __init__(self, plan: ReshardPlan, group: int, engine_rank: int, dtype: torch.dtype, device: torch.device | str):
        self._shapes = plan.hf_shapes(group)
        self._parcels = [parcel for parcel in plan.parcels(group) if parcel.engine_rank == engine_rank]
        self._dtype, self._device = dtype, device
        self._tensors: dict[str, Tensor] = {}

    @property
    def parcels(self) -> list[Parcel]:
        """What comes, by trainer rank."""
        return self._parcels

    def place(self, box: Box) -> Tensor:
        """Where the box belongs: a view of its tensor, to be written to."""
        name = box.hf_name
        if name not in self._tensors:
            self._tensors[name] = torch.empty(self._shapes[name], dtype=self._dtype, device=self._device)
        return self._tensors[name][box.hf_slices()]

    def give(self, box: Box, values: Tensor) -> None:
        """Takes the box's values; a tensor that comes whole in one box is used as it is."""
        if values.shape == self._shapes[box.hf_name]:
            self._tensors[box.hf_name] = values
        else:
            self.place(box).copy_(values)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the group; each is let go of as the next one is asked for.

        A rank whose part of a tensor is padding alone gets it with no part filled.
        """
        for name, shape in self._shapes.items():
            yield name, self._tensors.pop(name) if name in self._tensors else self._empty(shape)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)


def checksum(values: Tensor) -> int:
    """A number by which both sides tell whether they have the same values in the same order.

    The bits of each element as an integer, weighted by position, summed modulo 2^64: the same on any device.
    """
    flat = values.contiguous().flatten()
    bits = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
    total = 0
    for first in range(0, len(bits), _CHUNK_ELEMENTS):
        chunk = bits[first : first + _CHUNK_ELEMENTS].long()
        positions = torch.arange(first, first + len(chunk), device=chunk.device)
        total += int((chunk * (positions % _CHECKSUM_PERIOD + 1)).sum())
    return total % 2**64


def checksum_key(box: Box, parcel: Parcel) -> tuple[str, tuple[int, ...], int]:
    return box.hf_name, box.hf_start, parcel.engine_rank
