"""A prompt with its graded responses: what dynamic sampling collects, measures and filters."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade, GraderPool
from meds_megatron.reward.scores import overlong_penalties
from meds_megatron.rollout.response import Response
from meds_megatron.trainer.memory_row import MemoryRow, StoredFingerprint


@dataclass
class Sample:
    """One response with its grade and score; what a later phase finds out is None until then."""

    prompt: Prompt
    response: Response
    grade: Grade
    score: float
    """Correctness plus over-long penalty."""
    logprobs_R: np.ndarray | None = None
    """float32; the trainer's, before the first update of the step. None where no forward pass is needed."""
    entropy_R: np.ndarray | None = None
    fingerprint: StoredFingerprint | None = None
    memory_row: MemoryRow | None = None
    """None where the memory is not asked."""
    cluster_size: int = 0
    """Earlier mistakes in the cluster that this one falls into."""
    penalty: float = 0.0
    shaped_score: float | None = None
    advantage: float | None = None

    @property
    def has_fingerprint(self) -> bool:
        return self.response.boxed_token >= 0

    @cached_property
    def response_tokens_R(self) -> np.ndarray:
        return np.array(self.response.token_ids, dtype=np.int64)

    @cached_property
    def rollout_logprobs_R(self) -> np.ndarray:
        return np.array(self.response.logprobs, dtype=np.float32)


@dataclass
class PromptGroup:
    """The responses to one prompt."""

    prompt: Prompt
    samples: list[Sample]
    kept: bool = True
    """False where the group filter dropped it."""

    @property
    def accuracy(self) -> list[float]:
        return [float(sample.grade.correct) for sample in self.samples]

    @property
    def shaped_scores(self) -> list[float]:
        return [sample.shaped_score for sample in self.samples]

    @property
    def measured(self) -> bool:
        return all(sample.shaped_score is not None for sample in self.samples)


def failed_gradings(groups: list[PromptGroup]) -> int:
    """Responses whose grading timed out or broke; they count as wrong in the scores."""
    return sum(sample.grade.outcome in ("timeout", "error") for group in groups for sample in group.samples)


def grade_groups(
    prompts: list[Prompt], responses: list[Response], graders: GraderPool, config: Config
) -> list[PromptGroup]:
    """Groups `responses` by prompt and grades them."""
    answers = [prompts[response.prompt_index].problem.answer for response in responses]
    grades = graders.grade([response.text for response in responses], answers)
    lengths_B = np.array([len(response.token_ids) for response in responses])
    late_B = overlong_penalties(lengths_B, config.rollout.max_response_tokens, config.reward.overlong)
    groups = [PromptGroup(prompt, []) for prompt in prompts]
    for response, grade, late in zip(responses, grades, late_B, strict=True):
        group = groups[response.prompt_index]
        group.samples.append(Sample(group.prompt, response, grade, float(grade.correct) + float(late)))
    return groups
