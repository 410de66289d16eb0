"""The memory as the driver sees it: a shard actor on the node of each data-parallel rank, keys spread over them by a
stable hash."""

from collections.abc import Mapping, Sequence

import numpy as np
import ray

from meds_megatron.config import Config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.launch.placement import Place, Placement, rank_places
from meds_megatron.memory import shard_of, step_metrics
from meds_megatron.trainer.memory_row import MemoryRow
from meds_megatron.trainer.step_memory import StepMemory


class MemoryGroup:
    """Asks and teaches the shards. Fingerprints come to them from the ranks that made them; what passes through here
    are references, keys and sizes."""

    def __init__(self, config: Config, placement: Placement):
        layout = ParallelLayout.from_config(config)
        ranks = [layout.rank(tensor=0, data=data, pipeline=0) for data in range(layout.data)]
        nodes = [rank_places(config.cluster)[rank].node for rank in ranks]
        self._shards = [
            ray.remote(StepMemory)
            .options(**placement.options(Place(node, gpus=()), {"OMP_NUM_THREADS": "1"}))
            .remote(config.memory, number, layout.data)
            for number, node in enumerate(nodes)
        ]
        self._numbered = 0
        self._pending: list[ray.ObjectRef] = []

    def rows(self, keys: Sequence[str]) -> list[MemoryRow]:
        """The next numbers of this step, for responses of these keys."""
        first, self._numbered = self._numbered, self._numbered + len(keys)
        return [MemoryRow(first + place, key, shard_of(key, len(self._shards))) for place, key in enumerate(keys)]

    def lookup(self, rows: Sequence[MemoryRow], pieces: Sequence[Mapping[int, ray.ObjectRef]]) -> np.ndarray:
        """How many earlier mistakes of the same key lie in each response's cluster, int64 [N].

        `pieces` are the ranks' fingerprints by shard; only rows of answers without one are in none of them.
        """
        self.wait()
        sizes_N = np.zeros(len(rows), dtype=np.int64)
        places = self._places_by_shard(rows)
        answers = [
            self._shards[shard].lookup.remote(
                [rows[place].number for place in mine],
                [rows[place].key for place in mine],
                *(of_rank[shard] for of_rank in pieces if shard in of_rank),
            )
            for shard, mine in places.items()
        ]
        for mine, sizes in zip(places.values(), ray.get(answers), strict=True):
            sizes_N[mine] = sizes
        return sizes_N

    def remember(self, rows: Sequence[MemoryRow]) -> None:
        """Starts storing and reclustering what was looked up; the next lookup (or `wait`) sees it finished. Called
        once a step, if only for no rows: it moves the clock by which memories age."""
        places = self._places_by_shard(rows)
        for number, shard in enumerate(self._shards):
            self._pending.append(shard.remember.remote([rows[place].number for place in places.get(number, [])]))
        self._numbered = 0

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

    @staticmethod
    def _places_by_shard(rows: Sequence[MemoryRow]) -> dict[int, list[int]]:
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.shard, []).append(place)
        return places
