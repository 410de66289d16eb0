"""Responses on their way from engine to training batch: Completion, graded Sample, PromptGroup."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import DTypeLike

from meds_megatron.data.prompts import Prompt
from meds_megatron.latex import last_boxed
from meds_megatron.reward.answers import answer_class
from meds_megatron.reward.grading import Grade


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of a response: tokens that the policy drew, or tokens that it was given, such as a tool's result. Given
    tokens are context for the tokens after them, as a prompt is; they get neither loss nor importance weight."""

    token_ids: np.ndarray
    """int64; with an end-of-sequence token where the model drew one."""
    is_drawn: bool = True
    logprobs: np.ndarray | None = None
    """float32 log-probability of each drawn token as it was sampled: temperature, top-p and top-k applied. None for
    given tokens, and from engines of an evaluation."""
    policy_versions: np.ndarray | None = None
    """int64 version of the weights that drew each token; None for given tokens."""

    @classmethod
    def drawn(
        cls, token_ids: np.ndarray, logprobs: np.ndarray | None, versions: Sequence[tuple[int, int]]
    ) -> "Segment":
        """Tokens that the policy drew; `versions` are (policy version, index of the first token that it drew) of the
        weights at the beginning and after each weight update during the generation."""
        policy_versions = np.zeros(len(token_ids), dtype=np.int64)
        for version, start in versions:
            policy_versions[start:] = version
        return cls(token_ids, True, logprobs, policy_versions)

    @classmethod
    def given(cls, token_ids: np.ndarray) -> "Segment":
        return cls(token_ids, is_drawn=False)


@dataclass(frozen=True, eq=False)
class Completion:
    """One response. S: its tokens, R: those of them that the policy drew; a single-turn response is one drawn
    segment."""

    segments: tuple[Segment, ...]
    text: str
    """The tokens as text, special tokens left out."""
    finish_reason: Literal["stop", "length"]
    answer_position: int = -1
    """Index of the token that holds the `{` of the last `\\boxed{`; -1: no answer, and so no fingerprint."""
    no_answer_reason: str = ""
    """"no_box" or "box_at_end" (`rollout.answer_position`); empty with an answer."""

    @cached_property
    def token_ids_S(self) -> np.ndarray:
        """int64"""
        return _joined([segment.token_ids for segment in self.segments], np.int64)

    @cached_property
    def loss_mask_S(self) -> np.ndarray:
        """bool; whether the policy drew each token."""
        return _joined([np.full(len(segment.token_ids), segment.is_drawn) for segment in self.segments], np.bool_)

    @cached_property
    def logprobs_R(self) -> np.ndarray:
        """float32; empty from engines of an evaluation."""
        return _joined([s.logprobs for s in self.segments if s.logprobs is not None], np.float32)

    @cached_property
    def policy_versions_R(self) -> np.ndarray:
        """int64 version of the weights that drew each token."""
        return _joined([s.policy_versions for s in self.segments if s.policy_versions is not None], np.int64)

    @property
    def version_changes(self) -> list[tuple[int, int]]:
        """(policy version, index among the S tokens of the first one that it drew), first the one that drew the first
        token, then one for each weight update during the generation."""
        versions_R, drawn = self.policy_versions_R, np.flatnonzero(self.loss_mask_S)
        changes = [0, *(np.flatnonzero(np.diff(versions_R)) + 1)] if len(versions_R) else []
        return [(int(versions_R[place]), int(drawn[place])) for place in changes]


def _joined(arrays: list[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    """The arrays one after the other; a single one as it is."""
    if len(arrays) == 1 and arrays[0].dtype == dtype:
        return arrays[0]
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)


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
