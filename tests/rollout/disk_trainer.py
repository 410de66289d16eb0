"""A trainer of one rank with the weights of a model directory."""

from collections.abc import Iterable
from pathlib import Path

import torch

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.weights.hf_weights import HfWeights
from meds_megatron.weights.resharding.transfer import WeightSender
from meds_megatron.weights.resharding.types import StagedBucket, SyncSpec


class DiskTrainer:
    """Gives engines the weights of `directory` through files in `shared`, on a GPU through its memory."""

    def __init__(self, directory: Path, shared: Path, engine_tensor: int, device: str = "cpu"):
        shape = ModelShape.from_hf(directory)
        self.spec = SyncSpec(shape, ParallelLayout(), engine_tensor, "float32", str(shared))
        self.plan = self.spec.plan()
        weights, parameters = HfWeights(directory), {}
        for parameter in self.plan.table.stored:
            parameters[parameter.name] = torch.empty(parameter.local_shape(1))
            weights.fill(parameters[parameter.name], parameter, 0, 1)
        parameters = {name: tensor.to(device) for name, tensor in parameters.items()}
        self._sender = WeightSender(self.spec, 0, parameters, device, "127.0.0.1")

    def connect(self, pool: EnginePool) -> None:
        assert len(pool.outcomes(pool.call(pool.ready(), "connect", self.spec, None, {}))) == len(pool.engines)

    def stage(self, bucket: int) -> StagedBucket:
        return self._sender.stage_bucket(bucket, checksums=True)

    def load(self, pool: EnginePool, buckets: Iterable[int]) -> None:
        """Loads buckets of the plan into all engines and compares checksums."""
        for bucket in buckets:
            staged = self.stage(bucket)
            found = pool.outcomes(pool.call(pool.ready(), "load_bucket", bucket, True, staged))
            assert all(sums and sums.items() <= staged.checksums.items() for sums in found.values())
            self._sender.release_bucket(bucket)

    def update(self, pool: EnginePool, version: int) -> None:
        """A whole update of all engines."""
        pool.outcomes(pool.call(pool.ready(), "begin_weight_update", version))
        self.load(pool, self.plan.buckets)
        for engine in pool.outcomes(pool.call(pool.ready(), "finish_weight_update")):
            pool.engines[engine].health.updated()
