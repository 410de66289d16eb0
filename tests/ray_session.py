"""The Ray that tests share, and the engines in it that they share."""

from contextlib import ExitStack
from pathlib import Path

import ray

from meds_megatron.cluster.placement import Placement
from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.config import ClusterConfig
from meds_megatron.rollout.pool import EnginePool
from tests.rollout.engine_cases import engine_config, make_model


class RaySession:
    """A Ray of this machine, started when it is first needed and again after it was closed."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._pool: EnginePool | None = None
        self._running = ExitStack()

    def start(self) -> None:
        if not ray.is_initialized():
            self._running.enter_context(ray_cluster(ClusterConfig()))

    @property
    def model(self) -> Path:
        """The model of `pool`."""
        directory = self._directory / "model"
        return directory if directory.is_dir() else make_model(directory, "qwen3 tied", seed=0)

    @property
    def pool(self) -> EnginePool:
        """Two engines that have read the weights of `model`, for tests that leave them as they are."""
        if self._pool is None:
            self._pool = two_engines(self.model)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._running.close()


def two_engines(model: Path) -> EnginePool:
    config = engine_config(engines=2)
    pool = EnginePool(config, str(model), False, Placement(config.cluster, use_gpu=False), disk_version=0)
    pool.start()
    return pool
