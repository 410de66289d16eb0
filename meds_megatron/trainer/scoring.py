"""Scores of a step's responses: forward pass, memory lookup, penalty, and from the shaped scores the advantages."""

from collections.abc import Callable

import numpy as np
import torch

from meds_megatron.actor.schedule import NOT_SCHEDULED, minibatches_of
from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch
from meds_megatron.algorithm.advantages import AdvantageInputs, compute_advantages
from meds_megatron.algorithm.aggregation import aggregation_weights
from meds_megatron.config import Config
from meds_megatron.reward.scores import penalties, shape_scores
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.protocols import Memory, PendingCall, Policy
from meds_megatron.trainer.rollout_batch import RolloutBatch


def score(
    rollouts: RolloutBatch,
    policy: Policy,
    memory: Memory,
    config: Config,
    timer: PhaseTimer,
    wait_for: Callable[[PendingCall[ForwardOutput]], ForwardOutput],
) -> None:
    """Fills the batch: log-probs, entropies and fingerprints by one forward pass, cluster sizes by one lookup, and the
    shaped scores that follow (NaN for groups that are neither kept nor remembered, and where the grading failed).

    Of responses that are remembered but not trained on, only those with both a key and an answer take a forward pass,
    and none with `memory.method: answer`, which needs no fingerprints. `wait_for` waits for the forward pass
    (`RolloutManager.wait_for`).
    """
    batch, trained_B = rollouts.batch, rollouts.trained_B
    rows = rollouts.rows_to_remember(config)
    minibatches_B = update_minibatches(batch, trained_B, config)
    others = rows[~trained_B[rows] & (batch.answer_positions_B[rows] >= 0) & (config.memory.method != "answer")]
    # A mini-batch of their own leaves the micro-batches of the update as they are.
    minibatches_B[others] = minibatches_B.max(initial=NOT_SCHEDULED) + 1
    if (minibatches_B != NOT_SCHEDULED).any():
        with timer("forward"):
            output = wait_for(policy.forward(batch, minibatches_B))
        batch.logprobs_R, batch.entropy_R = output.logprobs_R, output.entropy_R
        batch.fingerprints_BL = output.fingerprints_BL
        batch.fingerprints_BL[(minibatches_B == NOT_SCHEDULED) | (batch.answer_positions_B < 0)] = np.nan
    else:
        batch.fingerprints_BL = np.zeros((len(batch), 0), dtype=np.float32)
        batch.logprobs_R = batch.entropy_R = np.full_like(batch.rollout_logprobs_R, np.nan)
    batch.cluster_sizes_B = np.zeros(len(batch), dtype=np.int64)
    batch.cluster_labels_B = np.zeros(len(batch), dtype=np.int64)
    with timer("memory"):
        match = memory.lookup(*rollouts.lookup_arguments(rows, config))
    batch.cluster_sizes_B[rows], batch.cluster_labels_B[rows] = match.sizes_N, match.labels_N
    batch.penalties_B = penalties(batch.cluster_sizes_B, config.penalty.alpha)
    shaped_B = shape_scores(batch.scores_B, batch.correct_B, batch.penalties_B, config.penalty.target)
    batch.shaped_scores_B = np.where(rollouts.kept_B | config.memory.remember_filtered, shaped_B, np.nan)


def training_batch(rollouts: RolloutBatch, config: Config) -> tuple[TrainBatch, np.ndarray, dict[str, float]]:
    """The responses to train on with advantages and loss weights, their mini-batches, and `advantage/...` metrics."""
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
    for number in range(minibatches_B.max(initial=NOT_SCHEDULED) + 1):
        members = np.flatnonzero(minibatches_B == number)
        lengths_B = torch.from_numpy(batch.response_lengths_B[members])
        batch.loss_weights_B[members] = aggregation_weights(
            lengths_B,
            config.policy.aggregation,
            total_tokens=int(lengths_B.sum()),
            total_responses=len(members),
            max_response_tokens=config.rollout.max_response_tokens,
        ).numpy()
    return batch, minibatches_B, {f"advantage/{name}": value for name, value in advantages.metrics.items()}


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
