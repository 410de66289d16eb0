"""Simulated parts of a run, in place of processes and GPUs: each does what its namesake does, in simulated time."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
from ray.exceptions import RayActorError

from meds_megatron.actor.schedule import NOT_SCHEDULED
from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch, UpdateOutput
from meds_megatron.bench.simulation.actor import LocalActor
from meds_megatron.bench.simulation.clock import Clock
from meds_megatron.bench.simulation.engine import SimulatedEngine
from meds_megatron.bench.simulation.rates import EngineRates, TrainerRates
from meds_megatron.bench.simulation.workload import Workload
from meds_megatron.config import Config
from meds_megatron.memory import UNKNOWN, Match
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.pool import Engine, EnginePool

T = TypeVar("T")


class SimulatedEnginePool(EnginePool):
    """The pool with simulated actors, whose waits let simulated time pass."""

    def __init__(self, config: Config, clock: Clock, rates: EngineRates, workload: Workload) -> None:
        self._clock, self._rates, self._workload = clock, rates, workload
        self._simulated: dict[int, SimulatedEngine] = {}
        """Simulated engines by number."""
        self._ended_busy_seconds = 0.0
        placement: Any = SimpleNamespace(options=lambda place, env_vars: {})
        super().__init__(config, "", use_gpu=True, placement=placement)

    @property
    def busy_seconds(self) -> float:
        """Busy seconds of all engines together."""
        return self._ended_busy_seconds + sum(engine.busy_seconds for engine in self._simulated.values())

    def kill(self, number: int) -> None:
        """The process of an engine dies."""
        self._simulated[number].die(RayActorError())

    def _make_actor(self, engine: Engine) -> Any:
        simulated = SimulatedEngine(self._clock, self._rates, self._workload, engine.number, self._disk_version)
        self._simulated[engine.number] = simulated
        return LocalActor(partial(_call, simulated))

    def _end_actors(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            ended = self._simulated.pop(engine.number)
            if ended.alive:
                ended.die(RayActorError())
            self._ended_busy_seconds += ended.busy_seconds

    def _wait_for_any(self, *events: Future) -> None:
        self._clock.wait_for_any(*events)


def _call(engine: SimulatedEngine, method: str, *arguments: Any) -> Future:
    """Result of a method of an engine's process: calls of one that is dead fail."""
    if engine.alive:
        return getattr(engine, method)(*arguments)
    failed: Future = Future()
    failed.set_exception(RayActorError())
    return failed


class SimulatedWeightSync:
    """Weight updates as `WeightSync` makes them, whose transfer takes the planned time."""

    def __init__(self, clock: Clock, rates: TrainerRates, pool: EnginePool) -> None:
        self.version = -1
        self.busy_seconds = 0.0
        self._rates, self._pool = rates, pool

    def update(self) -> None:
        self.version += 1
        self._load(self._pool.ready())

    def skip_update(self) -> None:
        self.version += 1

    def refill(self) -> None:
        if stale := self._pool.stale():
            self._load(stale)

    def _load(self, engines: list[int]) -> None:
        engines = list(self._pool.outcomes(self._pool.call(engines, "begin_weight_update", self.version)))
        for engine in engines:
            self._pool.engines[engine].health.update_began()
        self.busy_seconds += self._rates.sync_seconds
        engines = list(self._pool.outcomes(self._pool.call(engines, "load_bucket", self._rates.sync_seconds)))
        for engine in self._pool.outcomes(self._pool.call(engines, "finish_weight_update")):
            self._pool.engines[engine].health.updated()


@dataclass(frozen=True)
class SimulatedPending(Generic[T]):
    """A call of the trainer ranks that is under way."""

    clock: Clock
    done: Future

    def futures(self) -> list[Future]:
        return [self.done]

    def result(self) -> T:
        self.clock.wait_for_any(self.done)
        return self.done.result()


class SimulatedPolicy:
    """Trainer ranks whose passes take a time for each token."""

    def __init__(self, clock: Clock, rates: TrainerRates) -> None:
        self._clock, self._rates = clock, rates
        self.busy_seconds = 0.0
        self._holds_memory = False
        self.trained: list[tuple[int, int]] = []
        """Responses and tokens of each update."""

    def forward(self, batch: TrainBatch, minibatches_B: np.ndarray) -> SimulatedPending[ForwardOutput]:
        zeros_R = np.zeros_like(batch.rollout_logprobs_R)
        tokens = int(batch.lengths_B[minibatches_B != NOT_SCHEDULED].sum())
        output = ForwardOutput(zeros_R, zeros_R, np.zeros((len(batch), 1), np.float32))
        return self._call(tokens * self._rates.forward_seconds, output)

    def update(self, batch: TrainBatch, minibatches_B: np.ndarray, step: int) -> SimulatedPending[list[UpdateOutput]]:
        tokens = int(batch.lengths_B.sum())
        self.trained.append((len(batch), tokens))
        updated = UpdateOutput(0.0, {"tokens": float(tokens), "kl": 0.0}, 0.0, 0.0, skipped=False)
        return self._call(tokens * self._rates.update_seconds, [updated])

    def offload(self) -> None:
        if self._holds_memory:
            self._holds_memory = False
            self._copy()

    def onload(self) -> None:
        self._holds_memory = True
        self._copy()

    def export(self, directory: str) -> None:
        """Writes nothing."""

    def _copy(self) -> None:
        self.busy_seconds += self._rates.copy_seconds / 2
        self._clock.pass_seconds(self._rates.copy_seconds / 2)

    def _call(self, seconds: float, result: T) -> SimulatedPending[T]:
        self.busy_seconds += seconds
        return SimulatedPending(self._clock, self._clock.done_after(seconds, result))


class SimulatedGraders:
    """Grades that arrive a given time after the response."""

    def __init__(self, clock: Clock, rates: TrainerRates) -> None:
        self._clock, self._rates = clock, rates

    def submit(self, text: str, answer: str) -> Future[Grade]:
        return self._clock.done_after(self._rates.grading_seconds, Grade(text == answer, "graded"))


class NoMemory:
    """An error memory that knows nothing and remembers nothing."""

    def lookup(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> Match:
        return Match(np.full(len(keys), UNKNOWN), np.zeros(len(keys), dtype=np.int64))

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None:
        pass

    def wait(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}


class StepLog:
    """Metrics of the steps, and how often each prompt was trained on or dropped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.trained: dict[str, int] = defaultdict(int)
        self.dropped: dict[str, int] = defaultdict(int)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def log_responses(self, step: int, columns: dict[str, Any]) -> None:
        groups = {key.partition("|")[0]: kept for key, kept in zip(columns["key"], columns["kept"], strict=True)}
        for prompt, kept in groups.items():
            (self.trained if kept else self.dropped)[prompt] += 1
