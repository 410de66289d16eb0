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
