"""What trainer and engines tell each other about weights. Importing this needs neither torch nor megatron-core."""

from dataclasses import dataclass, field
from typing import Any

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.resharding.plan import ReshardPlan

Checksums = dict[tuple[str, tuple[int, ...], int], int]
"""Of boxes of weights, by Hugging Face name, first index of the box and engine rank."""


@dataclass(frozen=True)
class SyncSpec:
    """What both sides have to agree on; each makes the same plan of it."""

    shape: ModelShape
    layout: ParallelLayout
    engine_tensor: int
    dtype: str
    """Of the engines' weights, without the `torch.`."""
    directory: str
    """In the shared memory of each node."""

    def plan(self) -> ReshardPlan:
        return ReshardPlan(self.shape, self.layout, self.engine_tensor)


@dataclass
class Staged:
    """Parcels of a group that lie ready in one trainer rank's memory."""

    handles: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By trainer rank and engine rank."""
    checksums: Checksums = field(default_factory=dict)
