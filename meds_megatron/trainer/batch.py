"""The responses that a step trains on: text and grades for the reports, flat arrays for the ranks."""

from dataclasses import dataclass

import numpy as np
import torch

from meds_megatron.actor.messages import ForwardResult
from meds_megatron.actor.step_data import StepData, scatter_ragged
from meds_megatron.algorithm.advantages import group_advantages
from meds_megatron.config import AdvantageConfig, PenaltyConfig
from meds_megatron.reward.shaping import penalties, shape_scores
from meds_megatron.trainer.groups import PromptGroup
from meds_megatron.trainer.partition import balance, minibatches_of

TARGETS = {"wrong": (False,), "right": (True,), "both": (False, True), "none": ()}
UNJUDGED = ("timeout", "error")


@dataclass
class Batch:
    """B responses of the kept groups, group after group, and how they are shared out over the data-parallel ranks."""

    data: StepData
    rows: list[np.ndarray]
    """The responses of each data-parallel rank."""
    keys: list[str]
    """The memory key of each response: its problem and whether it is right."""
    correct_B: np.ndarray
    judged_B: np.ndarray
    """False where grading failed: nobody knows whether such a response is a mistake."""
    scores_B: np.ndarray
    sizes_B: np.ndarray
    """Earlier mistakes in the cluster that a response falls into."""
    penalties_B: np.ndarray
    shaped_scores_B: np.ndarray

    @classmethod
    def of_groups(cls, groups: list[PromptGroup], minibatch_prompts: int, data_parallel: int) -> "Batch":
        """Lays the responses flat and cuts them by mini-batch and data-parallel rank."""
        members = [(number, group, place) for number, group in enumerate(groups) for place in range(len(group.grades))]
        responses = [group.responses[place] for _, group, place in members]
        data = StepData.of_responses(
            prompts=[group.prompt.token_ids for _, group, _ in members],
            responses=[response.token_ids for response in responses],
            logprobs=[response.logprobs for response in responses],
            answer_positions=[response.boxed_token for response in responses],
            groups=[number for number, _, _ in members],
        )
        data.minibatches_B = minibatches_of(data.groups_B, minibatch_prompts)
        count = int(data.minibatches_B.max(initial=-1)) + 1
        data.minibatch_tokens_M = np.bincount(data.minibatches_B, data.response_lengths_B, count).astype(np.int64)
        data.minibatch_responses_M = np.bincount(data.minibatches_B, minlength=count)
        correct_B = np.array([group.grades[place].correct for _, group, place in members], dtype=bool)
        scores_B = np.array([group.scores[place] for _, group, place in members])
        return cls(
            data=data,
            rows=balance(data.lengths_B, data.minibatches_B, data_parallel),
            keys=[memory_key(group, place) for _, group, place in members],
            correct_B=correct_B,
            judged_B=np.array([group.grades[place].outcome not in UNJUDGED for _, group, place in members], dtype=bool),
            scores_B=scores_B,
            sizes_B=np.zeros(len(members), dtype=np.int64),
            penalties_B=np.zeros(len(members)),
            shaped_scores_B=scores_B,
        )

    def shards(self) -> list[StepData]:
        """Each data-parallel rank's part of the data as it is now."""
        return [self.data.select(rows) for rows in self.rows]

    def take_forward(self, results: list[ForwardResult]) -> None:
        """Puts the ranks' log-probs, entropies and fingerprints back in the order of the batch."""
        lengths_B = self.data.response_lengths_B
        self.data.logprobs_R = scatter_ragged([r.logprobs_R for r in results], self.rows, lengths_B)
        self.data.entropy_R = scatter_ragged([r.entropy_R for r in results], self.rows, lengths_B)
        self.data.fingerprints_BL = np.zeros((len(self.data), results[0].fingerprints_BL.shape[1]), dtype=np.float32)
        for rows, result in zip(self.rows, results, strict=True):
            self.data.fingerprints_BL[rows] = result.fingerprints_BL

    def targeted(self, target: str) -> np.ndarray:
        """The responses that the memory looks up and remembers: of the target's correctness, with a fingerprint."""
        has_fingerprint_B = self.data.answer_positions_B >= 0
        return np.flatnonzero(np.isin(self.correct_B, TARGETS[target]) & self.judged_B & has_fingerprint_B)

    def shape(self, rows: np.ndarray, sizes_N: np.ndarray, config: PenaltyConfig) -> None:
        """Punishes the responses `rows` for how often their mistake was made before."""
        self.sizes_B[rows] = sizes_N
        self.penalties_B[rows] = penalties(sizes_N, config.alpha)
        self.shaped_scores_B = shape_scores(self.scores_B, self.correct_B, self.penalties_B, config.target)

    def take_advantages(self, config: AdvantageConfig) -> None:
        """One advantage a response, from the shaped scores of its group."""
        self.data.advantages_B = group_advantages(
            torch.from_numpy(self.shaped_scores_B),
            torch.from_numpy(self.data.groups_B),
            normalize_std=config.normalize_std,
            epsilon=config.epsilon,
        ).numpy()


def memory_key(group: PromptGroup, place: int) -> str:
    """Problem and correctness group of a response."""
    return f"{group.prompt.problem.id}|{'right' if group.grades[place].correct else 'wrong'}"
