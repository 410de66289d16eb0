"""Prompts to graded groups: generation in an engine pool, and grading of what is finished meanwhile."""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count

import numpy as np

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade, GraderPool
from meds_megatron.reward.scores import overlong_penalties
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample
from meds_megatron.rollout.settings import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Grading:
    """A generated prompt whose grades are being computed."""

    index: int
    prompt: Prompt
    completions: list[Completion]
    grades: list[Future[Grade]]


class GroupProducer:
    """Generates and grades the responses to submitted prompts, side by side.

    `PromptGroup.index` counts the prompts in the order of submission. Sorted by it, groups do not depend on timing if
    the completions do not (`rollout.deterministic`). Dropping late groups instead would prefer short responses.
    """

    def __init__(self, pool: EnginePool, graders: GraderPool, config: Config) -> None:
        self._pool, self._graders, self._config = pool, graders, config
        self._indices = count()
        self._generating: dict[int, tuple[int, Prompt]] = {}
        """Index and prompt by request number."""
        self._grading: list[_Grading] = []

    @property
    def generating(self) -> bool:
        """Whether submitted prompts are still with the engines."""
        return bool(self._generating)

    @property
    def busy(self) -> bool:
        """Whether submitted prompts have not been returned yet."""
        return bool(self._generating or self._grading)

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> None:
        """Queues prompts in the pool, `seed` as in `EnginePool.submit`."""
        numbers = self._pool.submit([prompt.token_ids for prompt in prompts], sampling, seed)
        for number, prompt in zip(numbers, prompts, strict=True):
            self._generating[number] = (next(self._indices), prompt)

    def advance(self) -> list[PromptGroup]:
        """Waits until a request or a grade is finished or an engine has started or failed.

        Returns the groups that became complete, if any.
        """
        finished = [grading for grading in self._grading if all(grade.done() for grade in grading.grades)]
        if not finished:
            pending = [grade for grading in self._grading for grade in grading.grades if not grade.done()]
            for number, completions in self._pool.wait(*pending).items():
                index, prompt = self._generating.pop(number)
                answer = prompt.problem.answer
                grades = [self._graders.submit(completion.text, answer) for completion in completions]
                self._grading.append(_Grading(index, prompt, completions, grades))
            finished = [grading for grading in self._grading if all(grade.done() for grade in grading.grades)]
        self._grading = [grading for grading in self._grading if grading not in finished]
        return [self._group(grading) for grading in finished]

    def _group(self, grading: _Grading) -> PromptGroup:
        lengths_B = np.array([len(completion.token_ids_R) for completion in grading.completions])
        penalties_B = overlong_penalties(
            lengths_B, self._config.rollout.max_response_tokens, self._config.reward.overlong
        )
        samples = []
        for completion, grading_result, penalty in zip(grading.completions, grading.grades, penalties_B, strict=True):
            grade = grading_result.result()
            score = np.nan if grade.failed else float(grade.correct) + float(penalty)
            samples.append(Sample(grading.prompt, completion, grade, score))
        return PromptGroup(grading.prompt, samples, index=grading.index)


def failed_gradings(groups: Sequence[PromptGroup]) -> int:
    """Number of responses whose grading failed."""
    return sum(sample.grade.failed for group in groups for sample in group.samples)
