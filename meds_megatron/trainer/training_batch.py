"""The batch that a step trains on: advantages from the shaped scores, loss weights, mini-batches."""

from dataclasses import dataclass

import numpy as np
import torch

from meds_megatron.actor.schedule import NOT_SCHEDULED, minibatches_of
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.algorithm.advantages import AdvantageInputs, compute_advantages
from meds_megatron.algorithm.aggregation import aggregation_weights
from meds_megatron.config import Config
from meds_megatron.trainer.rollout_batch import RolloutBatch


@dataclass(frozen=True)
class StepBatch:
    """Responses that a step trains on; none where the filter kept no group or no grading succeeded."""

    responses: TrainBatch
    """Responses with advantages and loss weights."""
    minibatches_B: np.ndarray
    """int64 [B] mini-batch of each response."""
    ages_R: np.ndarray
    """int64 [R] age of each token: how many updates lie between the weights that drew it and the policy's."""
    metrics: dict[str, float]
    """`advantage/...`."""

    def __len__(self) -> int:
        return len(self.responses)


def training_batch(rollouts: RolloutBatch, policy_version: int, config: Config) -> StepBatch:
    """The responses to train the policy of that version on."""
    rows = np.flatnonzero(rollouts.trained_B)
    batch = rollouts.batch.select(rows)
    # Ranks have no use for them in the update.
    batch.fingerprints_BL = None
    minibatches_B = update_minibatches(batch, np.ones(len(batch), dtype=bool), config)
    inputs = AdvantageInputs(
        scores_B=torch.from_numpy(batch.shaped_scores_B),
        correct_B=torch.from_numpy(batch.correct_B),
        groups_B=torch.from_numpy(batch.groups_B),
        answers_B=_answer_numbers(rollouts, rows) if config.advantage.shapes_by_answer else None,
        counts_B=_history_counts(rollouts, rows) if config.advantage.count_coefficient > 0 else None,
    )
    advantages = compute_advantages(inputs, config.advantage)
    batch.advantages_B = advantages.advantages_B.numpy()
    batch.loss_weights_B = np.zeros(len(batch), dtype=np.float32)
    drawn_lengths_B = batch.drawn_lengths_B
    for number in range(minibatches_B.max(initial=NOT_SCHEDULED) + 1):
        members = np.flatnonzero(minibatches_B == number)
        lengths_B = torch.from_numpy(drawn_lengths_B[members])
        batch.loss_weights_B[members] = aggregation_weights(
            lengths_B,
            config.policy.aggregation,
            total_tokens=int(lengths_B.sum()),
            total_responses=len(members),
            max_response_tokens=config.rollout.max_response_tokens,
        ).numpy()
    metrics = {f"advantage/{name}": value for name, value in advantages.metrics.items()}
    return StepBatch(batch, minibatches_B, _token_ages(rollouts, rows, policy_version), metrics)


def _token_ages(rollouts: RolloutBatch, rows: np.ndarray, policy_version: int) -> np.ndarray:
    samples = rollouts.samples
    versions = [samples[row].completion.policy_versions_R for row in rows]
    return policy_version - np.concatenate([np.zeros(0, dtype=np.int64), *versions])


def _answer_numbers(rollouts: RolloutBatch, rows: np.ndarray) -> torch.Tensor:
    """A number for the final answer of each response of `rows`, int64: equal for equal answers."""
    samples = rollouts.samples
    numbers: dict[str | None, int] = {}
    return torch.tensor([numbers.setdefault(samples[row].final_answer, len(numbers)) for row in rows])


def _history_counts(rollouts: RolloutBatch, rows: np.ndarray) -> torch.Tensor:
    """Cluster size of each response of `rows`, int64; -1 where it was not looked up."""
    return torch.from_numpy(np.where(rollouts.looked_up_B, rollouts.batch.cluster_sizes_B, -1)[rows])


def update_minibatches(batch: TrainBatch, trained_B: np.ndarray, config: Config) -> np.ndarray:
    """Mini-batch of each response that is trained on, int64 [B]; NOT_SCHEDULED for the others."""
    minibatches_B = np.full(len(batch), NOT_SCHEDULED, dtype=np.int64)
    minibatches_B[trained_B] = minibatches_of(batch.groups_B[trained_B], config.train.mini_batch_prompts)
    return minibatches_B
