"""Types that trainer ranks and engine ranks exchange in a weight update. Imports neither torch, vllm nor megatron."""

from dataclasses import dataclass, field
from typing import Any

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.resharding.plan import ReshardPlan
from meds_megatron.weights.store_address import StoreAddress

Checksums = dict[tuple[str, tuple[int, ...], int], int]
"""Checksums of tensor slices by Hugging Face name, first index of the slice and engine rank."""


@dataclass(frozen=True)
class SyncSpec:
    """Settings that trainer ranks and engine ranks share; each side builds the same plan from them."""

    shape: ModelShape
    layout: ParallelLayout
    engine_tensor: int
    dtype: str
    """Type of the engines' weights, without the `torch.`."""
    directory: str
    """Directory for staged weights, in the shared memory of each node."""

    def plan(self) -> ReshardPlan:
        return ReshardPlan(self.shape, self.layout, self.engine_tensor)


@dataclass(frozen=True)
class StagedBucket:
    """Transfers of one bucket that are staged in the memory of a trainer rank's node."""

    handles: dict[tuple[int, int], Any] = field(default_factory=dict)
    """Handles of the local transport, by the trainer's tensor-parallel rank and engine rank."""
    checksums: Checksums = field(default_factory=dict)


@dataclass(frozen=True)
class Rendezvous:
    """The store through which a transfer group forms, and the size of the group."""

    store: StoreAddress
    senders: int
    """Trainer ranks: members 0 to senders - 1."""
    receivers: int
    """Engine ranks: the members after them."""

    @property
    def members(self) -> int:
        return self.senders + self.receivers
