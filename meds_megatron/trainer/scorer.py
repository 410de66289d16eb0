"""Scores of responses: forward pass, memory lookup and penalty."""

import numpy as np

from meds_megatron.actor.schedule import NOT_SCHEDULED
from meds_megatron.config import Config
from meds_megatron.reward.scores import penalties, shape_scores
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.generation import Generation
from meds_megatron.trainer.protocols import Memory, Policy
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.training_batch import update_minibatches


class Scorer:
    """Scores responses with the policy and the memory as they are at that moment; the engines generate meanwhile where
    they have GPUs of their own."""

    def __init__(
        self, config: Config, policy: Policy, memory: Memory, generation: Generation, timer: PhaseTimer
    ) -> None:
        self._config, self._policy, self._memory = config, policy, memory
        self._generation, self._timer = generation, timer

    def score(self, rollouts: RolloutBatch) -> None:
        """Fills the batch: log-probs, entropies and fingerprints by one forward pass, cluster sizes by one lookup, and
        the shaped scores that follow (NaN for groups that are neither kept nor remembered, and where the grading
        failed)."""
        batch, config = rollouts.batch, self._config
        rows = rollouts.rows_to_remember(config)
        self._forward(rollouts, rows)
        batch.cluster_sizes_B = np.zeros(len(batch), dtype=np.int64)
        batch.cluster_labels_B = np.zeros(len(batch), dtype=np.int64)
        with self._timer("memory"):
            match = self._memory.lookup(*rollouts.lookup_arguments(rows, config))
        batch.cluster_sizes_B[rows], batch.cluster_labels_B[rows] = match.sizes_N, match.labels_N
        batch.penalties_B = penalties(batch.cluster_sizes_B, config.penalty.alpha)
        shaped_B = shape_scores(batch.scores_B, batch.correct_B, batch.penalties_B, config.penalty.target)
        batch.shaped_scores_B = np.where(rollouts.kept_B | config.memory.remember_filtered, shaped_B, np.nan)

    def _forward(self, rollouts: RolloutBatch, rows: np.ndarray) -> None:
        """Log-probs, entropies and fingerprints of the responses that are trained on and of those, among `rows`, that
        are only remembered: these take a forward pass only where they have an answer, and none with `memory.method:
        answer`, which needs no fingerprints."""
        batch, trained_B = rollouts.batch, rollouts.trained_B
        minibatches_B = update_minibatches(batch, trained_B, self._config)
        has_fingerprint_N = (batch.answer_positions_B[rows] >= 0) & (self._config.memory.method != "answer")
        # A mini-batch of their own leaves the micro-batches of the update as they are.
        minibatches_B[rows[~trained_B[rows] & has_fingerprint_N]] = minibatches_B.max(initial=NOT_SCHEDULED) + 1
        if not (minibatches_B != NOT_SCHEDULED).any():
            batch.fingerprints_BL = np.zeros((len(batch), 0), dtype=np.float32)
            batch.logprobs_R = batch.entropy_R = np.full_like(batch.rollout_logprobs_R, np.nan)
            return
        with self._timer("forward"):
            output = self._generation.wait_for(self._policy.forward(batch, minibatches_B))
        batch.logprobs_R, batch.entropy_R = output.logprobs_R, output.entropy_R
        batch.fingerprints_BL = output.fingerprints_BL
        batch.fingerprints_BL[(minibatches_B == NOT_SCHEDULED) | (batch.answer_positions_B < 0)] = np.nan
