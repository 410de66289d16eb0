"""Responses on their way from engine to training batch: Completion, graded Sample, PromptGroup."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from meds_megatron.data.prompts import Prompt
from meds_megatron.latex import last_boxed
from meds_megatron.reward.answers import answer_class
from meds_megatron.reward.grading import Grade


@dataclass(frozen=True, eq=False)
class Completion:
    """One response of an engine. R: its tokens, an end-of-sequence token included when the model gave one."""

    token_ids_R: np.ndarray
    """int64"""
    logprobs_R: np.ndarray
    """float32 log-probability of each token as it was sampled: temperature, top-p and top-k applied. Empty from engines
    of an evaluation."""
    text: str
    """The tokens as text, special tokens left out."""
    finish_reason: Literal["stop", "length"]
    policy_version: int
    """Version of the weights that drew its first token."""
    answer_position: int = -1
    """Index of the token that holds the `{` of the last `\\boxed{`; -1: no answer, and so no fingerprint."""
    no_answer_reason: str = ""
    """"no_box" or "box_at_end" (`rollout.answer_position`); empty with an answer."""
    later_versions: tuple[tuple[int, int], ...] = ()
    """(policy version, index of the first token that it drew) of each weight update during the generation."""

    @property
    def policy_versions_R(self) -> np.ndarray:
        """int64 version of the weights that drew each token."""
        versions_R = np.full(len(self.token_ids_R), self.policy_version, dtype=np.int64)
        for version, start in self.later_versions:
            versions_R[start:] = version
        return versions_R


@dataclass
class Sample:
    """A graded completion."""

    prompt: Prompt
    completion: Completion
    grade: Grade
    score: float
    """Correctness plus over-long penalty; NaN where the grading failed."""

    @property
    def final_answer(self) -> str:
        r"""Content of the last `\boxed{}`, one text for all spellings (`answer_class`); empty without a box."""
        return answer_class(last_boxed(self.completion.text) or "")


@dataclass
class PromptGroup:
    """The samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]
    kept: bool = True
    """False where the group filter dropped it."""

    @property
    def accuracy(self) -> list[float]:
        """1 for a right response, 0 for a wrong one, of those whose grading did not fail."""
        return [float(sample.grade.correct) for sample in self.samples if not sample.grade.failed]
