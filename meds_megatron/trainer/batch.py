"""Samples as flat arrays for the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from meds_megatron.actor.messages import ForwardReply
from meds_megatron.actor.step_data import StepData
from meds_megatron.algorithm.advantages import AdvantageInputs, compute_advantages
from meds_megatron.config import AdvantageConfig
from meds_megatron.trainer.groups import PromptGroup, Sample
from meds_megatron.trainer.memory_row import StoredFingerprint
from meds_megatron.trainer.partition import balance, minibatches_of

NO_GROUP = -1


@dataclass
class Batch:
    """B samples, group after group, and how they are shared out over the data-parallel ranks."""

    samples: list[Sample]
    data: StepData
    rows: list[np.ndarray]
    """The samples of each data-parallel rank."""

    @classmethod
    def of_groups(
        cls,
        groups: Sequence[PromptGroup],
        minibatch_prompts: int,
        data_parallel: int,
        others: Sequence[Sample] = (),
    ) -> "Batch":
        """Lays the samples flat and cuts them by mini-batch and data-parallel rank.

        `others` come behind the groups in a mini-batch of their own, so that they do not change how the groups are cut.
        """
        samples = [sample for group in groups for sample in group.samples] + list(others)
        numbers = [number for number, group in enumerate(groups) for _ in group.samples]
        minibatches_B = minibatches_of(np.array(numbers, dtype=np.int64), minibatch_prompts)
        last = int(minibatches_B.max(initial=-1)) + 1
        data = _flat(samples, numbers + [NO_GROUP] * len(others))
        data.minibatches_B = np.append(minibatches_B, np.full(len(others), last, dtype=np.int64))
        count = last + bool(others)
        data.minibatch_tokens_M = np.bincount(data.minibatches_B, data.response_lengths_B, count).astype(np.int64)
        data.minibatch_responses_M = np.bincount(data.minibatches_B, minlength=count)
        return cls(samples, data, balance(data.lengths_B, data.minibatches_B, data_parallel))

    @property
    def correct_B(self) -> np.ndarray:
        return np.array([sample.grade.correct for sample in self.samples], dtype=bool)

    @property
    def scores_B(self) -> np.ndarray:
        return np.array([sample.score for sample in self.samples])

    @property
    def penalties_B(self) -> np.ndarray:
        return np.array([sample.penalty for sample in self.samples])

    @property
    def shaped_scores_B(self) -> np.ndarray:
        return np.array([sample.shaped_score for sample in self.samples], dtype=np.float64)

    def shards(self) -> list[StepData]:
        """Each data-parallel rank's part of the data as it is now."""
        return [self.data.select(rows) for rows in self.rows]

    def take_forward(self, replies: list[ForwardReply]) -> None:
        """Writes the ranks' log-probs and entropies onto the samples, and where their fingerprints are."""
        for rows, reply in zip(self.rows, replies, strict=True):
            end = 0
            for place, sample in enumerate(self.samples[row] for row in rows):
                start, end = end, end + len(sample.response_tokens_R)
                sample.logprobs_R, sample.entropy_R = reply.logprobs_R[start:end], reply.entropy_R[start:end]
                if sample.has_fingerprint:
                    sample.fingerprint = StoredFingerprint(reply.fingerprints_BL, place)

    def take_advantages(self, config: AdvantageConfig) -> None:
        """One advantage a sample, from the shaped scores of its group."""
        arrays = (self.shaped_scores_B, self.correct_B, self.data.groups_B)
        inputs = AdvantageInputs(*(torch.from_numpy(array_B) for array_B in arrays))
        self.data.advantages_B = compute_advantages(inputs, config).advantages_B.numpy()
        for sample, advantage in zip(self.samples, self.data.advantages_B, strict=True):
            sample.advantage = float(advantage)


def _flat(samples: list[Sample], groups: list[int]) -> StepData:
    data = StepData.of_responses(
        prompts=[sample.prompt.token_ids for sample in samples],
        responses=[sample.response_tokens_R for sample in samples],
        logprobs=[sample.rollout_logprobs_R for sample in samples],
        answer_positions=[sample.response.boxed_token for sample in samples],
        groups=groups,
    )
    owners = [sample.memory_row if sample.has_fingerprint else None for sample in samples]
    data.memory_shards_B = np.array([owner.shard if owner else -1 for owner in owners], dtype=np.int64)
    data.memory_rows_B = np.array([owner.number if owner else -1 for owner in owners], dtype=np.int64)
    if samples and all(sample.logprobs_R is not None for sample in samples):
        data.logprobs_R = np.concatenate([sample.logprobs_R for sample in samples])
        data.entropy_R = np.concatenate([sample.entropy_R for sample in samples])
    return data
