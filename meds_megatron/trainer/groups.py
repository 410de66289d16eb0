"""A prompt with its graded responses: what dynamic sampling collects and the filter judges."""

from dataclasses import dataclass

import numpy as np

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade, GraderPool
from meds_megatron.reward.overlong import overlong_penalties
from meds_megatron.rollout.response import Response


@dataclass
class PromptGroup:
    """The responses to one prompt, their grades and scores (correctness plus over-long penalty)."""

    prompt: Prompt
    responses: list[Response]
    grades: list[Grade]
    scores: list[float]
    kept: bool = True
    """False where the group filter dropped it."""

    @property
    def accuracy(self) -> list[float]:
        return [float(grade.correct) for grade in self.grades]


def failed_gradings(groups: list[PromptGroup]) -> int:
    """Responses whose grading timed out or broke; they count as wrong in the scores."""
    return sum(grade.outcome in ("timeout", "error") for group in groups for grade in group.grades)


def grade_groups(
    prompts: list[Prompt], responses: list[Response], graders: GraderPool, config: Config
) -> list[PromptGroup]:
    """Groups `responses` by prompt and grades them."""
    answers = [prompts[response.prompt_index].problem.answer for response in responses]
    grades = graders.grade([response.text for response in responses], answers)
    lengths_B = np.array([len(response.token_ids) for response in responses])
    late_B = overlong_penalties(lengths_B, config.rollout.max_response_tokens, config.reward.overlong)
    groups = [PromptGroup(prompt, [], [], []) for prompt in prompts]
    for response, grade, late in zip(responses, grades, late_B, strict=True):
        group = groups[response.prompt_index]
        group.responses.append(response)
        group.grades.append(grade)
        group.scores.append(float(grade.correct) + float(late))
    return groups
