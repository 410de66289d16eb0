"""The memory as the driver sees it: a shard actor on the node of each data-parallel rank, keys spread over them by a
stable hash."""

from collections.abc import Sequence

import numpy as np
import ray

from meds_megatron.config import Config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.launch.placement import Place, Placement, rank_places
from meds_megatron.memory.routing import shard_of
from meds_megatron.memory.shard import MemoryShard
from meds_megatron.memory.statistics import step_metrics


class MemoryGroup:
    """Looks up and remembers fingerprints. Remembering runs in the shards while the policy updates."""

    def __init__(self, config: Config, placement: Placement):
        layout = ParallelLayout.from_config(config)
        ranks = [layout.rank(tensor=0, data=data, pipeline=0) for data in range(layout.data)]
        nodes = [rank_places(config.cluster)[rank].node for rank in ranks]
        self._shards = [
            ray.remote(MemoryShard)
            .options(**placement.options(Place(node, gpus=()), {"OMP_NUM_THREADS": "1"}))
            .remote(config.memory, number, layout.data)
            for number, node in enumerate(nodes)
        ]
        self._pending: list[ray.ObjectRef] = []

    def lookup(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> np.ndarray:
        """How many earlier mistakes of the same key lie in each fingerprint's cluster, int64 [N]."""
        self.wait()
        sizes_N = np.zeros(len(keys), dtype=np.int64)
        parts = self._routed(keys)
        answers = [
            self._shards[shard].lookup.remote([keys[row] for row in rows], fingerprints_NL[rows])
            for shard, rows in parts
        ]
        for (_, rows), sizes in zip(parts, ray.get(answers), strict=True):
            sizes_N[rows] = sizes
        return sizes_N

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None:
        """Starts storing and reclustering; the next lookup (or `wait`) sees it finished. Called once a step: it moves
        the clock by which memories age."""
        rows_of = dict(self._routed(keys))
        for number, shard in enumerate(self._shards):
            if number in rows_of:
                rows = rows_of[number]
                self._pending.append(shard.remember.remote([keys[row] for row in rows], fingerprints_NL[rows]))
            self._pending.append(shard.recluster.remote())

    def remember_nothing(self) -> None:
        """Moves the clock of a step that had nothing to remember."""
        self._pending += [shard.recluster.remote() for shard in self._shards]

    def wait(self) -> None:
        """Returns when all that was remembered is clustered."""
        ray.get(self._pending)
        self._pending = []

    def metrics(self) -> dict[str, float]:
        """`memory/...` of the step since the last call."""
        return step_metrics(ray.get([shard.stats.remote() for shard in self._shards]))

    def close(self) -> None:
        for shard in self._shards:
            ray.kill(shard)

    def _routed(self, keys: Sequence[str]) -> list[tuple[int, np.ndarray]]:
        """The shards that own some of the keys, each with the rows of its keys."""
        owners_N = np.array([shard_of(key, len(self._shards)) for key in keys], dtype=np.int64)
        return [(int(shard), np.flatnonzero(owners_N == shard)) for shard in np.unique(owners_N)]
