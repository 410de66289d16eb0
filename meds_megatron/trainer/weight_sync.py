"""Weight updates of the engines: the reshard plan carried out, a bucket at a time."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import ray

from meds_megatron.cluster.placement import engine_places, rank_places
from meds_megatron.config import Config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.rollout.llm import engine_dtype
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.trainer.protocols import WeightSource
from meds_megatron.weights.resharding.plan import Route, find_routes
from meds_megatron.weights.resharding.staging import begins_and_ends
from meds_megatron.weights.resharding.types import Checksums, StagedBucket, SyncSpec


class WeightSync:
    """Copies the policy's weights into the engines, and numbers their versions.

    For every bucket of the plan, the trainer ranks on an engine's node stage their transfers in the node's memory and
    those elsewhere send theirs, while the engine loads. As many buckets are under way as are together no larger than
    the largest: a data-parallel replica stages that much at most, and an engine holds as much.

    An engine that fails during an update is restarted by the pool and left out; the others finish. Engines that share
    GPUs with the trainer must have their weights awake.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        policy: WeightSource,
        pool: EnginePool,
        shared_directory: str,
        first_version: int = 0,
    ) -> None:
        """`shared_directory` is a directory in the shared memory of every node; the caller removes it at the end.
        `first_version` is that of the first update, which gives the engines their first weights."""
        self.version = first_version - 1
        """Policy version: the number of updates of the engines' weights since the run began, the first not counted."""
        self._first_version = first_version
        layout = ParallelLayout.from_config(config)
        self._policy, self._pool = policy, pool
        self._spec = SyncSpec(shape, layout, config.rollout.tensor, engine_dtype(config), shared_directory)
        self._plan = self._spec.plan()
        self._checksum_every = config.sync.checksum_every
        self._routes: dict[int, list[Route]] = defaultdict(list)
        for route in find_routes(
            layout,
            [place.node for place in rank_places(config.cluster)],
            [place.node for place in engine_places(config.cluster, config.rollout)],
            allow_local=config.sync.transport == "auto",
        ):
            self._routes[route.engine].append(route)
        self._connected: dict[int, ray.actor.ActorHandle] = {}
        """Actor of each engine when it was connected: a restarted engine has another."""
        policy.prepare_weight_sync(self._spec)

    def update(self) -> None:
        """Gives all engines the current weights under the next version. Raises UserError when a checksum differs."""
        self.version += 1
        self._load(self._pool.ready())

    def skip_update(self) -> None:
        """Counts an update whose weights no engine gets, since none generates any more."""
        self.version += 1

    def refill(self) -> None:
        """Gives restarted engines the current weights under the current version; returns at once when there are none.

        Raises UserError when a checksum differs.
        """
        if stale := self._pool.stale():
            self._load(stale)

    def _load(self, engines: list[int]) -> None:
        check = self.version == self._first_version or (
            self._checksum_every > 0 and self.version % self._checksum_every == 0
        )
        engines = [engine for engine in engines if self._is_connected(engine) or self._connect(engine)]
        engines = self._on_engines(engines, "begin_weight_update", self.version)
        for engine in engines:
            self._pool.engines[engine].health.update_began()
        under_way: dict[int, _BucketTransfer] = {}
        for bucket, is_begin in begins_and_ends(self._plan):
            if is_begin:
                under_way[bucket] = self._begin(bucket, engines, check)
            else:
                engines = self._finish(under_way.pop(bucket), engines)
        for engine in self._on_engines(engines, "finish_weight_update"):
            self._pool.engines[engine].health.updated()

    def _begin(self, bucket: int, engines: list[int], check: bool) -> "_BucketTransfer":
        stage = self._plan.pipeline_stage(bucket)
        routes = [route for engine in engines for route in self._routes[engine] if route.stage == stage]
        local_ranks = {route.rank for route in routes if route.local}
        staged = {rank: self._on_sender(rank, "stage_bucket", bucket, check) for rank in sorted(local_ranks)}
        # Staged before anything is sent: an engine reads staged transfers first, and a sender waits for its engine.
        sent = [self._on_sender(route.rank, "send", bucket, route.engine, check) for route in routes if not route.local]
        loads: dict[int, ray.ObjectRef] = {}
        for engine in engines:
            near = sorted({route.rank for route in routes if route.engine == engine and route.local})
            loads |= self._pool.call([engine], "load_bucket", bucket, check, *(staged[rank] for rank in near))
        return _BucketTransfer(bucket, staged, sent, loads)

    def _finish(self, transfer: "_BucketTransfer", engines: list[int]) -> list[int]:
        """Waits for a bucket and frees its staged memory; returns the engines that have loaded it."""
        # The trainer's side first: a rank that failed fails the loads of all engines with it.
        staged: list[StagedBucket] = self._policy.results(list(transfer.staged.values()))
        sent: list[Checksums] = self._policy.results(transfer.sent)
        loaded = self._pool.outcomes({engine: transfer.loads[engine] for engine in engines})
        self._policy.results([self._on_sender(rank, "release_bucket", transfer.bucket) for rank in transfer.staged])
        expected: Checksums = {}
        for checksums in [*(part.checksums for part in staged), *sent]:
            expected |= checksums
        for engine, found in loaded.items():
            compare(expected, found, engine)
        return list(loaded)

    def _is_connected(self, engine: int) -> bool:
        return self._connected.get(engine) is self._pool.engines[engine].actor

    def _connect(self, engine: int) -> bool:
        """Gives an engine the sources of its weights and, for those on other nodes, a transfer group."""
        actor = self._pool.engines[engine].actor
        remote = [route for route in self._routes[engine] if not route.local]
        rendezvous, senders = None, {}
        if remote:
            senders = {(route.stage, route.trainer_rank): member for member, route in enumerate(remote)}
            opened = self._on_sender(remote[0].rank, "open_group", engine, len(remote), self._plan.engine_tensor)
            (rendezvous,) = self._policy.results([opened])
        calls = self._pool.call([engine], "connect", self._spec, rendezvous, senders)
        joined = [
            self._on_sender(route.rank, "join_group", engine, rendezvous, member) for member, route in enumerate(remote)
        ]
        connected = bool(self._pool.outcomes(calls))
        if connected := all(self._policy.results(joined)) and connected:
            self._connected[engine] = actor
        return connected

    def _on_engines(self, engines: Iterable[int], method: str, *arguments) -> list[int]:
        """Calls a method; returns the engines that did not fail."""
        return list(self._pool.outcomes(self._pool.call(engines, method, *arguments)))

    def _on_sender(self, rank: int, method: str, *arguments) -> ray.ObjectRef:
        """Calls a method of a trainer rank's WeightSender."""
        return self._policy.on_rank(rank, "weights", method, *arguments)


@dataclass(frozen=True)
class _BucketTransfer:
    """A bucket under way."""

    bucket: int
    staged: dict[int, ray.ObjectRef]
    """Staged buckets by trainer rank."""
    sent: list[ray.ObjectRef]
    loads: dict[int, ray.ObjectRef]
    """Loads by engine."""


def compare(expected: Checksums, found: Checksums, engine: int) -> None:
    """Raises UserError, naming it, for a tensor slice whose received values differ from those sent."""
    for (name, start, engine_rank), value in found.items():
        if expected[name, start, engine_rank] != value:
            raise UserError(
                f"engine {engine} (rank {engine_rank}) received other values of {name} from {list(start)} on than "
                "the trainer sent: check the memory of the machine and the network, and start again from a checkpoint"
            )
