"""Protocols of a run's parts: what the training loop calls of them.

Real parts run processes, simulated ones (bench/simulation) take simulated time, and those of the tests are scripted.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch, UpdateOutput
from meds_megatron.data.prompts import Prompt
from meds_megatron.memory import Match
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.weights.resharding.types import SyncSpec

T_co = TypeVar("T_co", covariant=True)


class PendingCall(Protocol[T_co]):
    """A call of the policy that is under way, as `supervision.PendingResult`."""

    def futures(self) -> list[Future]: ...

    def result(self) -> T_co: ...


class Policy(Protocol):
    """The policy that is trained, as `PolicyGroup`."""

    def forward(self, batch: TrainBatch, minibatches_B: np.ndarray) -> PendingCall[ForwardOutput]: ...

    def update(self, batch: TrainBatch, minibatches_B: np.ndarray, step: int) -> PendingCall[list[UpdateOutput]]: ...

    def offload(self) -> None: ...

    def onload(self) -> None: ...

    def export(self, directory: str) -> None: ...


class WeightSource(Protocol):
    """The ranks whose weights the engines get, as `PolicyGroup`."""

    def prepare_weight_sync(self, spec: SyncSpec) -> None: ...

    def on_rank(self, rank: int, method: str, *args: Any) -> Any:
        """A reference to the result, for `results`."""

    def results(self, calls: Sequence[Any]) -> list: ...


class Producer(Protocol):
    """The generation and grading of submitted prompts, as `GroupProducer`."""

    @property
    def generating(self) -> bool: ...

    @property
    def busy(self) -> bool: ...

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        seed: int | None = None,
        first: bool = False,
    ) -> list[int]: ...

    def advance(self, *others: Future) -> dict[int, PromptGroup]: ...


class Engines(Protocol):
    """The engines' memory and requests as a whole, as `EnginePool`."""

    @property
    def asleep(self) -> bool: ...

    @property
    def running(self) -> bool: ...

    def hold(self) -> None: ...

    def release(self) -> None: ...

    def sleep(self, keep_weights: bool) -> None: ...

    def wake(self, part: Literal["weights", "kv_cache"]) -> None: ...

    def metrics(self) -> dict[str, float]: ...


class WeightUpdates(Protocol):
    """The updates of the engines' weights, as `WeightSync`."""

    @property
    def version(self) -> int: ...

    def update(self) -> None: ...

    def skip_update(self) -> None: ...

    def refill(self) -> None: ...


class Memory(Protocol):
    """The memory of mistakes, as `ErrorMemory`."""

    def lookup(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> Match: ...

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None: ...

    def wait(self) -> None: ...

    def metrics(self) -> dict[str, float]: ...
