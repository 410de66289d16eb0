"""Generation for a run: what is under way in the engines, while the trainer waits for it or computes."""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import TypeVar

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.faults.interruption import Interruption
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.gpus import Gpus
from meds_megatron.trainer.protocols import Engines, PendingCall, Producer, WeightUpdates

T = TypeVar("T")


class Generation:
    """Submitted prompts, which become finished (generated and graded) groups whenever the driver waits for something:
    for groups, or, with `train.max_staleness` above 0, for the trainer's ranks.

    Engines that were restarted get their weights meanwhile.
    """

    def __init__(
        self,
        config: Config,
        producer: Producer,
        engines: Engines,
        weight_sync: WeightUpdates,
        gpus: Gpus,
        interruption: Interruption,
        timer: PhaseTimer,
    ) -> None:
        self._producer, self._engines, self._weight_sync, self._gpus = producer, engines, weight_sync, gpus
        self._interruption, self._timer = interruption, timer
        self._finishes_before_update = config.train.max_staleness > 0 and config.rollout.on_update == "finish"
        self._finished: dict[int, PromptGroup] = {}
        """Groups that nothing has taken yet, by number."""

    @property
    def generating(self) -> bool:
        """Whether submitted prompts are still with the engines."""
        return self._producer.generating

    @property
    def policy_version(self) -> int:
        """Version of the policy, and of the weights that the engines have."""
        return self._weight_sync.version

    @property
    def stop_requested(self) -> bool:
        return self._interruption.requested.done()

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        seed: int | None = None,
        first: bool = False,
    ) -> list[int]:
        """Numbers of the groups of `prompts`; arguments as of `EnginePool.submit`."""
        return self._producer.submit(prompts, sampling, seed, first)

    def take_finished(self, numbers: Collection[int]) -> dict[int, PromptGroup]:
        """Groups of `numbers` that are finished and were not taken before, by number."""
        return {number: self._finished.pop(number) for number in [*self._finished] if number in numbers}

    def check_stop(self) -> None:
        """Raises Stopped if a stop has been requested."""
        self._interruption.check()

    def advance(self) -> None:
        """Waits until something happens: a group may have finished, an engine failed, or a stop been requested."""
        self._weight_sync.refill()
        self._advance(self._interruption.requested)

    def wait_for(self, pending: PendingCall[T]) -> T:
        """The result of a call of the trainer's ranks, while the engines generate. An error of one rank is raised at
        once: the others may wait for it."""
        under_way = pending.futures() if self._producer.busy else []
        while self._producer.busy and under_way:
            self._advance(*under_way)
            done = [future for future in under_way if future.done()]
            under_way = [] if any(map(Future.exception, done)) else [one for one in under_way if one not in done]
        return pending.result()

    def update_weights(self, updated: bool) -> None:
        """Gives the engines the policy's weights if it was `updated`, and those that lack weights theirs; afterwards
        all can generate.

        With `rollout.on_update: finish` the engines finish their responses first. A stop that is requested meanwhile
        leaves them as they are: they are not needed any more.
        """
        finishes = updated and self._finishes_before_update
        if finishes and not self._finish_responses():
            self._weight_sync.skip_update()
            return
        with self._timer("sync"):
            if updated:
                self._weight_sync.update()
            else:
                self._weight_sync.refill()
        self._gpus.wake_kv_cache()
        if finishes:
            self._engines.release()

    def _finish_responses(self) -> bool:
        """Whether the engines have finished all responses that they had begun; they begin no others until `release`."""
        with self._timer("rollout"):
            self._engines.hold()
            while self._engines.running and not self.stop_requested:
                self._advance(self._interruption.requested)
        return not self._engines.running

    def _advance(self, *others: Future) -> None:
        self._finished |= self._producer.advance(*others)
