"""Prompts to graded groups: generation in an engine pool, and grading of what is finished meanwhile."""

from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from threading import Lock

import numpy as np

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade, GraderPool
from meds_megatron.reward.scores import overlong_penalties
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample
from meds_megatron.rollout.settings import Sampling


class _Grading:
    """A generated prompt whose grades are being computed; `done` is set when the last one is.

    One event a prompt, not one a response: a step has thousands of these, and a wait costs time for each.
    """

    def __init__(self, number: int, prompt: Prompt, completions: list[Completion], graders: GraderPool) -> None:
        self.number, self.prompt, self.completions = number, prompt, completions
        self.done: Future[None] = Future()
        self._unfinished, self._lock = len(completions), Lock()
        self.grades = [graders.submit(completion.text, prompt.problem.answer) for completion in completions]
        for grade in self.grades:
            grade.add_done_callback(self._count)

    def _count(self, _: Future[Grade]) -> None:
        with self._lock:
            self._unfinished -= 1
            if not self._unfinished:
                self.done.set_result(None)


class GroupProducer:
    """Generates and grades the responses to submitted prompts, side by side.

    Groups have numbers, which count the prompts in the order of submission. In that order, groups do not depend on
    timing if the completions do not (a seed). Dropping late groups instead would prefer short responses.
    """

    def __init__(self, pool: EnginePool, graders: GraderPool, config: Config) -> None:
        self._pool, self._graders, self._config = pool, graders, config
        self._numbers = count()
        self._generating: dict[int, tuple[int, Prompt]] = {}
        """Group number and prompt by request number."""
        self._grading: list[_Grading] = []

    @property
    def generating(self) -> bool:
        """Whether submitted prompts are still with the engines."""
        return bool(self._generating)

    @property
    def busy(self) -> bool:
        """Whether submitted prompts have not been returned yet."""
        return bool(self._generating or self._grading)

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling],
        seed: int | None = None,
        first: bool = False,
    ) -> list[int]:
        """Queues prompts in the pool, arguments as of `EnginePool.submit`; returns the numbers of their groups."""
        requests = self._pool.submit([prompt.token_ids for prompt in prompts], sampling, seed, first)
        numbers = [next(self._numbers) for _ in requests]
        self._generating |= zip(requests, zip(numbers, prompts, strict=True), strict=True)
        return numbers

    def advance(self, *others: Future) -> dict[int, PromptGroup]:
        """Waits until a request or the grades of one are finished, an engine has started or failed, or one of `others`
        is done.

        Returns the groups that became complete, if any, by number.
        """
        if not any(grading.done.done() for grading in self._grading):
            for request, completions in self._pool.wait(*(g.done for g in self._grading), *others).items():
                self._grading.append(_Grading(*self._generating.pop(request), completions, self._graders))
        finished = {grading.number: grading for grading in self._grading if grading.done.done()}
        self._grading = [grading for grading in self._grading if grading.number not in finished]
        return {number: self._group(grading) for number, grading in finished.items()}

    def _group(self, grading: _Grading) -> PromptGroup:
        lengths_B = np.array([len(completion.token_ids_S) for completion in grading.completions])
        penalties_B = overlong_penalties(
            lengths_B, self._config.rollout.max_response_tokens, self._config.reward.overlong
        )
        samples = []
        for completion, grading_result, penalty in zip(grading.completions, grading.grades, penalties_B, strict=True):
            grade = grading_result.result()
            score = np.nan if grade.failed else float(grade.correct) + float(penalty)
            samples.append(Sample(grading.prompt, completion, grade, score))
        return PromptGroup(grading.prompt, samples)


def first_failed_grading(groups: Sequence[PromptGroup]) -> str:
    """Reason of the first grading that failed; "" if there is none."""
    return next((sample.grade.detail for group in groups for sample in group.samples if sample.grade.failed), "")


def failed_gradings(groups: Sequence[PromptGroup]) -> int:
    """Number of responses whose grading failed."""
    return sum(sample.grade.failed for group in groups for sample in group.samples)
