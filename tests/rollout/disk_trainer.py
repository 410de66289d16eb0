"""A trainer of one rank whose weights are those of a model directory: what engines are given in tests."""

from collections.abc import Iterable
from pathlib import Path

import torch

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.weights.load import HfWeights
from meds_megatron.weights.resharding.messages import SyncSpec
from meds_megatron.weights.resharding.sender import WeightSender
from meds_megatron.weights.resharding.transport.shared_memory import SharedMemory


class DiskTrainer:
    """Gives engines the weights of `directory` through files in `shared`."""

    def __init__(self, directory: Path, shared: Path, engine_tensor: int):
        shape = ModelShape.from_hf(directory)
        self.spec = SyncSpec(shape, ParallelLayout(), engine_tensor, "float32", str(shared))
        self.plan = self.spec.plan()
        weights, parameters = HfWeights(directory), {}
        for group in self.plan.groups:
            for entry in self.plan.table.groups[group]:
                if not entry.copy:
                    parameters[entry.name] = torch.empty(entry.local_shape(1))
                    weights.fill(parameters[entry.name], entry, 0, 1)
        self._sender = WeightSender(self.spec, 0, 0, parameters, SharedMemory(shared))

    def connect(self, group: EngineGroup) -> None:
        assert len(group.outcomes(group.call(group.ready(), "connect", self.spec, None, {}))) == len(group.engines)

    def stage(self, number: int):
        return self._sender.stage(number, checksums=True)

    def load(self, group: EngineGroup, numbers: Iterable[int]) -> None:
        """Loads groups of the plan into all engines, comparing checksums."""
        for number in numbers:
            staged = self.stage(number)
            found = group.outcomes(group.call(group.ready(), "load_group", number, True, staged))
            assert all(sums and sums.items() <= staged.checksums.items() for sums in found.values())
            self._sender.release(number)

    def update(self, group: EngineGroup, version: int) -> None:
        """A whole update of all engines."""
        group.outcomes(group.call(group.ready(), "begin_weight_update", version))
        self.load(group, self.plan.groups)
        for engine in group.outcomes(group.call(group.ready(), "finish_weight_update")):
            group.fleet.filled(engine)
