"""Responses for the training loop: the engines kept busy, the steps filled, the weights updated."""

import logging
from collections import deque
from concurrent.futures import Future
from typing import Literal, TypeVar

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.faults.interruption import Interruption
from meds_megatron.rollout.group_schedule import GroupSchedule
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.filtering import mark_kept, shortfall
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.protocols import Engines, Memory, PendingCall, Policy, Producer, WeightUpdates
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.scoring import score
from meds_megatron.trainer.state import TrainerState

T = TypeVar("T")

logger = logging.getLogger(__name__)


class RolloutManager:
    """Generates, grades and filters the responses that steps train on, as the `GroupSchedule` says.

    Without staleness all methods but `collect` and `validate` find the engines idle. With it, prompts are submitted
    ahead of the steps that train on them, and forward passes and updates are waited for with `wait_for`, in which
    groups finish.
    """

    def __init__(
        self,
        config: Config,
        state: TrainerState,
        prompts: Prompts,
        producer: Producer,
        pool: Engines,
        weight_sync: WeightUpdates,
        policy: Policy,
        memory: Memory,
        timer: PhaseTimer,
        interruption: Interruption,
    ) -> None:
        self._config, self._state, self._prompts = config, state, prompts
        self._producer, self._pool, self._weight_sync = producer, pool, weight_sync
        self._policy, self._memory = policy, memory
        self._timer, self._interruption = timer, interruption
        self._schedule = GroupSchedule(config)
        self._overlaps = config.train.max_staleness > 0
        self._indices: dict[int, int] = {}
        """Index of the prompt of each unfinished group, by the group's number."""
        self._finished: dict[int, PromptGroup] = {}
        """Groups that are generated and graded and that nothing has taken yet."""
        self._again = deque(state.unfinished)
        """Prompts that the run before a restart had begun."""

    @property
    def unfinished_prompts(self) -> list[int]:
        """Indices of the prompts that were drawn and neither trained on nor dropped, in order."""
        return [*(self._indices[number] for number in self._schedule.unfinished), *self._again]

    def collect(self) -> RolloutBatch:
        """Responses of step `state.step`, of which up to `train.prompts_per_step` groups are kept.

        They are scored with `filter.metric: shaped`, whose filter needs the scores, and where generation overlaps with
        training: groups are then scored while others are generated. Raises UserError when `filter.max_batches`
        generation batches do not fill the step and `filter.when_short` is stop, and Stopped when a stop is requested.
        """
        config, schedule, parts = self._config, self._schedule, []
        schedule.open_step(self._state.policy_version, later_steps=config.train.steps - self._state.step)
        while not schedule.is_complete:
            with self._timer("sync"):
                self._wake("weights")
                self._wake("kv_cache")
            self._submit()
            numbers = self._wait_for_chunk()
            part = RolloutBatch.of_groups([self._finished.pop(number) for number in numbers], config)
            if config.filter.metric == "shaped":
                with self._timer("sync"):
                    # Another generation batch may follow with the same weights.
                    self._pool.sleep(keep_weights=True)
                self._score(part)
            mark_kept(part, config.filter, schedule.missing)
            if self._overlaps and not part.is_scored:
                self._score(part)
            for number, group in zip(numbers, part.groups, strict=True):
                schedule.examined(number, group.kept)
                del self._indices[number]
            parts.append(part)
        rollouts = RolloutBatch.joined(parts, schedule.generation_batches)
        if config.filter.when_short == "stop" and (sentence := shortfall(rollouts, config)):
            raise UserError(
                f"Step {self._state.step}: {sentence}: raise filter.max_batches, or set filter.when_short to continue"
            )
        schedule.close_step()
        # For later steps.
        self._submit()
        return rollouts

    def free_gpus(self) -> None:
        """Engines on the trainer's GPUs sleep, and drop their weights."""
        with self._timer("sync"):
            self._pool.sleep(keep_weights=False)

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
        """Gives the engines the policy's weights, if they were `updated`, and those on the trainer's GPUs theirs.

        A stop that is requested while responses under way are waited for leaves the engines as they are: they are not
        needed any more.
        """
        finishes = updated and self._overlaps and self._config.rollout.on_update == "finish"
        if finishes:
            with self._timer("rollout"):
                self._pool.hold()
                while self._pool.running and not self._interruption.requested.done():
                    self._advance(self._interruption.requested)
            if self._pool.running:
                self._state.policy_version = self._weight_sync.skip_update()
                return
        with self._timer("sync"):
            self._wake("weights")
            if updated:
                self._weight_sync.update()
                self._state.policy_version = self._weight_sync.version
            else:
                self._weight_sync.refill()
            self._wake("kv_cache")
        if finishes:
            self._pool.release()

    def validate(self) -> list[PromptGroup]:
        """Every validation prompt's responses; none where a stop is requested meanwhile, so that the step under way can
        be finished in time."""
        prompts, sampling = self._prompts.validation, Sampling.validation(self._config.rollout)
        with self._timer("validation"):
            # The same draws every time, so that two validations differ by the policy alone; beside other requests no
            # draws can be repeated.
            seed = None if self._overlaps else self._config.train.seed
            numbers = self._producer.submit(prompts, sampling, seed, first=self._overlaps)
            while not self._finished.keys() >= set(numbers):
                if self._interruption.requested.done():
                    logger.warning("a validation was abandoned: its step has no validation metrics")
                    return []
                self._weight_sync.refill()
                self._advance(self._interruption.requested)
        return [self._finished.pop(number) for number in numbers]

    def metrics(self) -> dict[str, float]:
        """`rollout/...` since the last call."""
        return self._pool.metrics() | ({"rollout/unfinished": len(self.unfinished_prompts)} if self._overlaps else {})

    def _submit(self) -> None:
        """Submits the prompts that the schedule has room for."""
        if not (room := self._schedule.room):
            return
        again = [self._again.popleft() for _ in range(min(room, len(self._again)))]
        indices = again + self._state.sampler.next(room - len(again))
        train, batch = self._config.train, self._schedule.generation_batches
        seed = generation_seed(train.seed, self._state.step, batch) if self._config.rollout.deterministic else None
        prompts = [self._prompts.train[index] for index in indices]
        numbers = self._producer.submit(prompts, Sampling.training(self._config.rollout), seed)
        self._indices |= zip(numbers, indices, strict=True)
        self._schedule.admit(numbers)

    def _wait_for_chunk(self) -> list[int]:
        """Groups that the schedule has the step examine next."""
        self._interruption.check()
        with self._timer("rollout"):
            while self._producer.generating and not self._schedule.examinable():
                self._advance_step()
        # Most responses are graded while others are generated.
        with self._timer("reward"):
            while not (chunk := self._schedule.examinable()):
                self._advance_step()
        return chunk

    def _advance_step(self) -> None:
        self._interruption.check()
        self._weight_sync.refill()
        self._advance(self._interruption.requested)

    def _advance(self, *others) -> None:
        for number, group in self._producer.advance(*others).items():
            self._finished[number] = group
            if number in self._indices:
                self._schedule.finish(number)

    def _score(self, part: RolloutBatch) -> None:
        score(part, self._policy, self._memory, self._config, self._timer, self.wait_for)

    def _wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Returns GPU memory to sleeping engines: for their weights before an update, for the KV cache after it. The
        trainer's gradients and, with `train.offload_optimizer`, its optimizer state make room first."""
        if self._pool.asleep:
            self._policy.free_memory()
            self._pool.wake(part)


def generation_seed(run_seed: int, step: int, batch: int) -> int:
    """A seed of its own for every generation batch of a run."""
    return (run_seed * 1_000_003 + step) * 101 + batch
