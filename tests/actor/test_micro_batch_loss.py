"""Inputs of the policy's loss of a micro-batch."""

import numpy as np
import pytest
import torch

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import Config


def test_advantages_are_shaped_by_the_entropy_of_the_updates_own_forward_pass():
    from meds_megatron.actor.microbatch import build_micro_batch
    from meds_megatron.actor.policy import _MicroBatchLoss

    config = Config()
    config.advantage.entropy_coefficient = 0.4
    batch = TrainBatch.of_responses([[1], [1]], [[2, 3], [4]], [[-1.0, -1.0], [-1.0]], [-1, -1], [0, 0])
    batch.logprobs_R = batch.rollout_logprobs_R
    batch.entropy_R = np.full(3, 100.0, np.float32)  # of the policy that sampled the responses
    batch.advantages_B = np.array([1.0, -1.0])
    batch.loss_weights_B = np.full(2, 1 / 3, np.float32)
    logprobs_R = torch.full((3,), -1.0, requires_grad=True)
    entropy_R = torch.tensor([0.5, 1.0, 3.0], requires_grad=True)
    loss, kept = _MicroBatchLoss(batch, config, "cpu")(
        build_micro_batch(batch, np.array([0, 1]), batch.lengths_B, 8, "cpu"), logprobs_R, entropy_R
    )
    # Added to the advantages: 0.4 * 0.5, 0.4 * 1 and, since 0.4 * 3 is beyond half of |-1|, 0.5. All ratios are 1.
    assert loss.item() == pytest.approx(-(1.2 + 1.4 - 0.5) / 3)
    assert kept["entropy_bonus"].item() == pytest.approx(0.2 + 0.4 + 0.5)
    loss.backward()
    assert logprobs_R.grad.tolist() == pytest.approx([-1.2 / 3, -1.4 / 3, 0.5 / 3])
    assert entropy_R.grad is None


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_given_tokens_get_neither_loss_nor_importance_weight(importance):
    """A response whose middle was given: the loss is that of its four other tokens, by hand."""
    from meds_megatron.actor.microbatch import build_micro_batch
    from meds_megatron.actor.policy import _MicroBatchLoss

    config = Config()
    config.policy.importance, config.policy.importance_cap = importance, None
    drawn = np.array([True, True, False, False, False, True, True])
    engine_R, old_R = np.array([-1.0, -2.0, -1.5, -0.5], np.float32), np.array([-1.1, -1.9, -1.2, -0.6], np.float32)
    batch = TrainBatch.of_responses([[1, 2]], [[3, 4, 5, 6, 7, 8, 9]], [engine_R], [5], [0], [drawn])
    batch.logprobs_R, batch.advantages_B, batch.loss_weights_B = old_R, np.array([2.0]), np.full(1, 1 / 4, np.float32)
    micro_batch = build_micro_batch(batch, np.array([0]), batch.lengths_B, 12, "cpu")
    assert micro_batch.targets_Q.tolist() == [3, 4, 8, 9] and micro_batch.predictors_Q.tolist() == [1, 2, 6, 7]
    assert micro_batch.answers_N.tolist() == [7], "the answer's position is that in the whole sequence"
    logprobs_R = torch.from_numpy(old_R).requires_grad_()
    loss, kept = _MicroBatchLoss(batch, config, "cpu")(micro_batch, logprobs_R, torch.zeros(4))
    log_weights_R = old_R - engine_R if importance == "token" else np.full(4, (old_R - engine_R).sum())
    assert loss.item() == pytest.approx(-2.0 * np.exp(log_weights_R).mean(), rel=1e-6)
    assert kept["tokens"].item() == 4 and kept["importance_weight"].item() == pytest.approx(np.exp(log_weights_R).sum())
    loss.backward()
    assert logprobs_R.grad.numpy() == pytest.approx(-2.0 / 4 * np.exp(log_weights_R), rel=1e-6)
