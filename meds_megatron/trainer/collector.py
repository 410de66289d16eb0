"""Rollouts of a step: prompts drawn and generated, groups graded, filtered and scored until the step is full."""

from collections import deque

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.rollout.group_schedule import GroupSchedule
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.filtering import mark_kept, shortfall
from meds_megatron.trainer.generation import Generation
from meds_megatron.trainer.gpus import Gpus
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.scorer import Scorer
from meds_megatron.trainer.state import TrainerState


class Collector:
    """Fills steps with groups by the `GroupSchedule`. With `train.max_staleness` above 0 it also submits prompts ahead
    of the steps that train on them."""

    def __init__(
        self,
        config: Config,
        state: TrainerState,
        prompts: Prompts,
        generation: Generation,
        scorer: Scorer,
        gpus: Gpus,
        timer: PhaseTimer,
    ) -> None:
        self._config, self._state, self._prompts = config, state, prompts
        self._generation, self._scorer, self._gpus, self._timer = generation, scorer, gpus, timer
        self._schedule = GroupSchedule(config)
        self._indices: dict[int, int] = {}
        """Index of the prompt of each group that was submitted and not examined, by the group's number."""
        self._finished: dict[int, PromptGroup] = {}
        """Groups that are generated and graded, by number."""
        self._again = deque(state.unfinished)
        """Prompts that the run before a restart had begun."""

    def collect(self) -> RolloutBatch:
        """Scored responses for step `state.step`, of which up to `train.prompts_per_step` groups are kept; afterwards
        the trainer may compute on the GPUs.

        Groups are scored one generation batch after the other with `filter.metric: shaped`, whose filter needs the
        scores, and while others are generated where generation overlaps with training. Raises UserError when
        `filter.max_batches` generation batches do not fill the step and `filter.when_short` is stop, and Stopped when a
        stop is requested.
        """
        config, schedule, parts = self._config, self._schedule, []
        schedule.open_step(self._generation.policy_version, later_steps=config.train.steps - self._state.step)
        while not schedule.is_complete:
            self._gpus.wake_engines()
            self._submit()
            numbers = self._wait_for_chunk()
            part = RolloutBatch.of_groups([self._finished.pop(number) for number in numbers], config)
            self._filter(part)
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
        self._state.unfinished = [*(self._indices[number] for number in schedule.unfinished), *self._again]
        self._gpus.release_engines()
        if not rollouts.is_scored:
            self._scorer.score(rollouts)
        return rollouts

    def _filter(self, part: RolloutBatch) -> None:
        """Keeps the groups of a part that the step trains on, and scores the part if it need not wait for the rest."""
        is_shaped, overlaps = self._config.filter.metric == "shaped", self._config.train.max_staleness > 0
        if is_shaped:
            # Another generation batch may follow with the same weights.
            self._gpus.pause_engines()
            self._scorer.score(part)
        mark_kept(part, self._config.filter, self._schedule.missing)
        if overlaps and not is_shaped:
            self._scorer.score(part)

    def _submit(self) -> None:
        """Submits the prompts that the schedule has room for."""
        if not (room := self._schedule.room):
            return
        again = [self._again.popleft() for _ in range(min(room, len(self._again)))]
        indices = again + self._state.sampler.next(room - len(again))
        train, batch = self._config.train, self._schedule.generation_batches
        seed = generation_seed(train.seed, self._state.step, batch) if self._config.rollout.deterministic else None
        prompts = [self._prompts.train[index] for index in indices]
        numbers = self._generation.submit(prompts, Sampling.training(self._config.rollout), seed)
        self._indices |= zip(numbers, indices, strict=True)
        self._schedule.admit(numbers)

    def _wait_for_chunk(self) -> list[int]:
        """Groups that the schedule has the step examine next."""
        self._generation.check_stop()
        with self._timer("rollout"):
            while self._generation.generating and not self._examinable():
                self._advance()
        # Most responses are graded while others are generated.
        with self._timer("reward"):
            while not (chunk := self._examinable()):
                self._advance()
        return chunk

    def _advance(self) -> None:
        self._generation.check_stop()
        self._generation.advance()

    def _examinable(self) -> list[int]:
        for number, group in self._generation.take_finished(self._indices).items():
            self._finished[number] = group
            self._schedule.finish(number)
        return self._schedule.examinable()


def generation_seed(run_seed: int, step: int, batch: int) -> int:
    """A seed of its own for every generation batch of a run."""
    return (run_seed * 1_000_003 + step) * 101 + batch
