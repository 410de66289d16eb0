"""The trainer ranks as the driver sees them: one object whose calls reach every rank."""

import ray

from meds_megatron.actor.environment import rank_environment
from meds_megatron.actor.messages import ForwardReply, Rendezvous, UpdateResult
from meds_megatron.actor.step_data import StepData
from meds_megatron.actor.worker import PolicyWorker
from meds_megatron.config import Config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.launch.placement import Placement, rank_places
from meds_megatron.weights.resharding.messages import SyncSpec
from meds_megatron.weights.resharding.transport.network import Meeting

CLOSE_SECONDS = 5


class PolicyGroup:
    """Starts a Ray actor a rank and speaks to them together."""

    def __init__(self, config: Config, model_dir: str, placement: Placement):
        self.layout = ParallelLayout.from_config(config)
        self._model_dir = model_dir
        worker, environment = ray.remote(PolicyWorker), rank_environment(config)
        self._workers = [
            worker.options(**placement.options(place, environment)).remote(config)
            for place in rank_places(config.cluster)
        ]
        self._config = config

    def start(self) -> None:
        """Returns when every rank has met the others and loaded its share of the model."""
        world = self.layout.ranks
        host, port = ray.get(self._workers[0].open_rendezvous.remote(world))
        timeout = self._config.cluster.collective_timeout_minutes
        ray.get(
            [
                worker.start.remote(Rendezvous(host, port, rank, world, timeout), self._model_dir)
                for rank, worker in enumerate(self._workers)
            ]
        )

    def forward(self, shards: list[StepData]) -> list[ForwardReply]:
        """Forward results of each data-parallel rank's shard."""
        results = self._on_shards("forward", shards)
        return [next(result for result in replica if result is not None) for replica in results]

    def update(self, shards: list[StepData], step: int) -> list[list[UpdateResult]]:
        """For each data-parallel rank, its optimizer steps (their sums from the rank that speaks for the replica)."""
        results = self._on_shards("update", shards, step)
        return [max(replica, key=lambda steps: len(steps[0].sums)) for replica in results]

    def prepare_sync(self, spec: SyncSpec) -> None:
        """Makes every rank ready to send its share of the weights."""
        self._on_all("prepare_sync", spec)

    def open_meeting(self, rank: int, engine: int, senders: int, receivers: int) -> Meeting:
        """Where trainer ranks and the ranks of an engine meet: at trainer rank `rank`."""
        return ray.get(self.on_rank(rank, "open_meeting", engine, senders, receivers))

    def on_rank(self, rank: int, method: str, *args) -> ray.ObjectRef:
        """Calls a method of one rank."""
        return getattr(self._workers[rank], method).remote(*args)

    def export(self, directory: str) -> None:
        self._on_all("export", directory, self._model_dir)

    def free_cached_memory(self) -> None:
        """Leaves the GPUs' memory that is not in use to the engines that share them."""
        self._on_all("free_cached_memory")

    def close(self) -> None:
        """Ends the ranks; those of other nodes get CLOSE_SECONDS to clear their nodes' shared memory."""
        if self._config.cluster.nodes > 1:
            calls = [worker.close.remote() for worker in self._workers]
            ray.wait(calls, num_returns=len(calls), timeout=CLOSE_SECONDS)
        for worker in self._workers:
            ray.kill(worker)

    def _on_all(self, method: str, *args) -> list:
        return ray.get([getattr(worker, method).remote(*args) for worker in self._workers])

    def _on_shards(self, method: str, shards: list[StepData], *args) -> list[list]:
        """Calls `method` on every rank with its data-parallel rank's shard; results by data-parallel rank."""
        references = [ray.put(shard) for shard in shards]
        calls = []
        for rank, worker in enumerate(self._workers):
            calls.append(getattr(worker, method).remote(references[self.layout.coordinates(rank).data], *args))
        results: list[list] = [[] for _ in shards]
        for rank, result in enumerate(ray.get(calls)):
            results[self.layout.coordinates(rank).data].append(result)
        return results
