"""New weights for the engines: the resharding plan carried out, a layer group at a time."""

from collections import defaultdict
from dataclasses import dataclass

import ray

from meds_megatron.config import Config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.launch.placement import engine_places, rank_places
from meds_megatron.rollout.engine import engine_dtype
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.weights.resharding.messages import Checksums, Staged, SyncSpec
from meds_megatron.weights.resharding.plan import interleaved
from meds_megatron.weights.resharding.routes import Route, find_routes


class WeightSync:
    """Carries the policy's weights into the engines. An engine that dies on the way is left behind; the others finish.

    For every group of the plan, the trainer ranks on an engine's node stage their parcels in the node's memory and
    those elsewhere send theirs, while the engine loads. As many groups are under way as are together no larger than the
    largest: a data-parallel replica stages that much at the most, and an engine holds as much.
    """

    def __init__(self, config: Config, shape: ModelShape, policy: PolicyGroup, engines: EngineGroup, directory: str):
        """`directory` is one in the shared memory of every node, which whoever starts the run removes."""
        layout = ParallelLayout.from_config(config)
        self._policy, self._engines = policy, engines
        self._spec = SyncSpec(shape, layout, config.rollout.tensor, engine_dtype(config), directory)
        self._plan = self._spec.plan()
        self._every = config.sync.checksum_every
        routes = find_routes(
            layout,
            [place.node for place in rank_places(config.cluster)],
            [place.node for place in engine_places(config.cluster, config.rollout)],
            allow_local=config.sync.transport == "auto",
        )
        self._routes: dict[int, list[Route]] = defaultdict(list)
        for route in routes:
            self._routes[route.engine].append(route)
        self._connected: dict[int, object] = {}
        """The actor that each connected engine was then: one started anew has to be connected again."""
        self._version = 0
        policy.prepare_sync(self._spec)

    def update(self, version: int) -> None:
        """Gives all engines that have started the weights as they are now, as `version`.

        Raises UserError when a checksum differs.
        """
        self._version = version
        self.fill(self._engines.ready())

    def fill(self, engines: list[int]) -> None:
        """Gives `engines` the weights as they are now, under the version of the last update."""
        fleet, check = self._engines.fleet, self._check_due()
        self._engines.wake("weights")
        ready = self._engines.ready()
        engines = self._connect([engine for engine in engines if engine in ready])
        engines = self._on_engines(engines, "begin_weight_update", self._version)
        for engine in engines:
            fleet.update_began(engine)
        under_way: list[_GroupTransfer] = []
        for group in interleaved(self._plan):
            elements = self._plan.elements(group)
            while under_way and sum(t.elements for t in under_way) + elements > self._plan.largest_group:
                engines = self._finish(under_way.pop(0), engines)
            under_way.append(self._begin(group, engines, check))
        for transfer in under_way:
            engines = self._finish(transfer, engines)
        for engine in self._on_engines(engines, "finish_weight_update"):
            fleet.filled(engine)
        self._engines.wake("kv_cache")

    def _begin(self, group: int, engines: list[int], check: bool) -> "_GroupTransfer":
        stage = self._plan.stage(group)
        routes = [route for engine in engines for route in self._routes[engine] if route.stage == stage]
        stagers = sorted({route.rank for route in routes if route.local})
        staged = {rank: self._policy.on_rank(rank, "stage", group, check) for rank in stagers}
        # All parcels are staged before any is sent: an engine reads those first, and a sender waits for its engine.
        sent = [
            self._policy.on_rank(route.rank, "send", group, route.engine, check) for route in routes if not route.local
        ]
        loads = {}
        for engine in engines:
            near = sorted({route.rank for route in routes if route.engine == engine and route.local})
            loads |= self._engines.call([engine], "load_group", group, check, *(staged[rank] for rank in near))
        return _GroupTransfer(group, self._plan.elements(group), staged, sent, loads)

    def _finish(self, transfer: "_GroupTransfer", engines: list[int]) -> list[int]:
        """Waits for a group; returns the engines that have it. Its staged memory is given back."""
        loaded = self._engines.outcomes({e: load for e, load in transfer.loads.items() if e in engines})
        staged: list[Staged] = ray.get(list(transfer.staged.values()))
        sent: list[Checksums] = ray.get(transfer.sent)
        ray.get([self._policy.on_rank(rank, "release", transfer.group) for rank in transfer.staged])
        expected: Checksums = {}
        for checksums in [*(part.checksums for part in staged), *sent]:
            expected |= checksums
        for engine, found in loaded.items():
            compare(expected, found, engine)
        return list(loaded)

    def _connect(self, engines: list[int]) -> list[int]:
        """Tells engines where their weights come from; returns those that are connected."""
        connected = []
        for engine in engines:
            actor = self._engines.engines[engine]
            if self._connected.get(engine) is actor or self._connect_one(engine):
                self._connected[engine] = actor
                connected.append(engine)
        return connected

    def _connect_one(self, engine: int) -> bool:
        remote = [route for route in self._routes[engine] if not route.local]
        meeting, senders = None, {}
        if remote:
            senders = {(route.stage, route.trainer_rank): member for member, route in enumerate(remote)}
            meeting = self._policy.open_meeting(remote[0].rank, engine, len(remote), self._plan.engine_tensor)
        calls = self._engines.call([engine], "connect", self._spec, meeting, senders)
        joined = [
            self._policy.on_rank(route.rank, "join", engine, meeting, member) for member, route in enumerate(remote)
        ]
        connected = bool(self._engines.outcomes(calls))
        return all(ray.get(joined)) and connected

    def _on_engines(self, engines: list[int], method: str, *arguments) -> list[int]:
        """Calls a method; returns the engines that did it."""
        return list(self._engines.outcomes(self._engines.call(engines, method, *arguments)))

    def _check_due(self) -> bool:
        return self._version == 0 or (self._every > 0 and self._version % self._every == 0)


@dataclass(frozen=True)
class _GroupTransfer:
    """A group on its way."""

    group: int
    elements: int
    staged: dict[int, ray.ObjectRef]
    """By trainer rank."""
    sent: list[ray.ObjectRef]
    loads: dict[int, ray.ObjectRef]
    """By engine."""


def compare(expected: Checksums, found: Checksums, engine: int) -> None:
    """Raises UserError, naming it, for a box that the engine received otherwise than it was sent."""
    for (name, start, engine_rank), value in found.items():
        if expected[name, start, engine_rank] != value:
            raise UserError(
                f"engine {engine} (rank {engine_rank}) received other values of {name} from {list(start)} on than "
                "the trainer sent: check the memory of the machine and the network, and start again from a checkpoint"
            )
