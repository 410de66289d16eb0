"""Scripted parts of a run, in place of processes: each has the methods of its protocol (trainer/protocols.py), which
tests/trainer/test_protocols.py compares.

Parts of one run may share a list of `calls`, which then shows the order in which they are called.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import numpy as np
from ray.exceptions import RayActorError

from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch, UpdateOutput
from meds_megatron.bench.simulation.actor import LocalActor
from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.rollout.pool import Engine, EnginePool
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.weights.resharding.types import StagedBucket, SyncSpec

T = TypeVar("T")
Call = tuple[Any, ...]
"""Method that was called, with the arguments that tests compare."""


@dataclass(frozen=True)
class ScriptedCall(Generic[T]):
    """A call of the policy with a given result, or the error of one of its ranks' calls."""

    value: T
    under_way: tuple[Future, ...] = ()
    """A call of each rank; those that hang are not waited for."""

    def futures(self) -> list[Future]:
        return list(self.under_way)

    def result(self) -> T:
        for future in self.under_way:
            if future.done():
                future.result()
        return self.value


def no_fingerprints(batch: TrainBatch) -> np.ndarray:
    """The same two logits of every response."""
    return np.zeros((len(batch), 2))


class ScriptedPolicy:
    """A policy whose calls are done at once, and whose fingerprints are `fingerprints_of(batch)`.

    Buckets that are staged for a weight update have a checksum that is their number.
    """

    def __init__(
        self, calls: list[Call] | None = None, fingerprints_of: Callable[[TrainBatch], np.ndarray] = no_fingerprints
    ) -> None:
        self.calls = [] if calls is None else calls
        self._fingerprints_of = fingerprints_of
        self.forwarded: list[int] = []
        """Responses of each forward pass."""
        self.updated: list[int] = []
        """Responses of each update."""
        self.staged: dict[int, set[int]] = {}
        """Buckets by rank."""
        self.staged_history: list[set[int]] = []
        """Buckets of all ranks, after each that was staged."""

    def forward(self, batch: TrainBatch, minibatches_B: np.ndarray) -> ScriptedCall[ForwardOutput]:
        self.calls.append(("forward",))
        self.forwarded.append(int((minibatches_B >= 0).sum()))
        zeros_R = np.zeros(len(batch.rollout_logprobs_R), np.float32)
        return ScriptedCall(ForwardOutput(zeros_R, zeros_R, self._fingerprints_of(batch).astype(np.float32)))

    def update(self, batch: TrainBatch, minibatches_B: np.ndarray, step: int) -> ScriptedCall[list[UpdateOutput]]:
        assert batch.logprobs_R is not None and batch.advantages_B is not None
        assert np.isfinite(batch.advantages_B).all() and (minibatches_B >= 0).all()
        self.calls.append(("update",))
        self.updated.append(len(batch))
        sums = dict.fromkeys(("tokens", "kl", "ratio", "clip_fraction", "dual_clip_fraction"), 1.0)
        return ScriptedCall([UpdateOutput(0.0, sums, 0.0, 0.0, skipped=False)])

    def offload(self) -> None:
        self.calls.append(("offload",))

    def onload(self) -> None:
        self.calls.append(("onload",))

    def export(self, directory: str) -> None:
        self.calls.append(("export", directory))

    def prepare_weight_sync(self, spec: SyncSpec) -> None:
        self.spec = spec

    def on_rank(self, rank: int, method: str, *args: Any) -> StagedBucket | None:
        part, action, bucket = method, *args[:2]
        assert part == "weights"
        mine = self.staged.setdefault(rank, set())
        if action == "release_bucket":
            mine.remove(bucket)
            return None
        assert action == "stage_bucket"
        mine.add(bucket)
        self.staged_history.append(set().union(*self.staged.values()))
        return StagedBucket(checksums={("tensor", (bucket,), 0): bucket})

    def results(self, calls: Sequence[Any]) -> list:
        return list(calls)


class ScriptedProducer:
    """Groups that `make(prompt)` gives, completed one by one, the prompt that was submitted last first."""

    def __init__(self, make: Callable[[Prompt], PromptGroup], calls: list[Call] | None = None) -> None:
        self.calls = [] if calls is None else calls
        self.submitted: list[Prompt] = []
        """Submitted prompts in order, finished ones included."""
        self._make = make
        self._unfinished: dict[int, Prompt] = {}

    @property
    def generating(self) -> bool:
        return bool(self._unfinished)

    @property
    def busy(self) -> bool:
        return bool(self._unfinished)

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        seed: int | None = None,
        first: bool = False,
    ) -> list[int]:
        self.calls.append(("generate",))
        numbers = range(len(self.submitted), len(self.submitted) + len(prompts))
        self.submitted += prompts
        self._unfinished |= zip(numbers, prompts, strict=True)
        return list(numbers)

    def advance(self, *others: Future) -> dict[int, PromptGroup]:
        number, prompt = self._unfinished.popitem()
        return {number: self._make(prompt)}


class ScriptedWeightSync:
    """Weight updates without weights."""

    def __init__(self, calls: list[Call] | None = None) -> None:
        self.calls = [] if calls is None else calls
        self.version = 0

    def update(self) -> None:
        self.calls.append(("sync",))
        self.version += 1

    def skip_update(self) -> None:
        self.version += 1

    def refill(self) -> None:
        self.calls.append(("refill",))


class ScriptedEnginePool(EnginePool):
    """The pool over engines whose methods return at once, but for requests, which are never finished.

    The engines share the trainer's GPUs unless `rollout.nodes` gives them others. Their calls are (method, *arguments,
    engine). `failing` is the number of the call of a method, (engine, method), at which an engine fails with `error`.
    """

    def __init__(
        self,
        config: Config,
        calls: list[Call] | None = None,
        disk_version: int | None = None,
        failing: dict[tuple[int, str], int] | None = None,
        error: Exception | None = None,
    ) -> None:
        self.calls = [] if calls is None else calls
        self._failing, self._error = failing or {}, error or RayActorError()
        placement: Any = SimpleNamespace(options=lambda place, env_vars: {})
        super().__init__(config, "", use_gpu=True, placement=placement, disk_version=disk_version)

    def count(self, engine: int, method: str) -> int:
        """Calls of an engine's method."""
        return sum((call[0], call[-1]) == (method, engine) for call in self.calls)

    def _make_actor(self, engine: Engine) -> Any:
        return LocalActor(partial(self._call, engine.number))

    def _end_actors(self, engines: Sequence[Engine]) -> None:
        pass

    def _wait_for_any(self, *events: Future) -> None:
        assert any(event.done() for event in events), "nothing would end this wait"

    def _call(self, engine: int, method: str, *arguments: Any) -> Future:
        self.calls.append((method, *arguments, engine))
        result: Future = Future()
        if self._failing.get((engine, method)) == self.count(engine, method):
            result.set_exception(self._error)
        elif method == "load_bucket":
            bucket = arguments[0]
            result.set_result({("tensor", (bucket,), 0): bucket})
        elif method != "take_finished":
            result.set_result(None)
        return result
