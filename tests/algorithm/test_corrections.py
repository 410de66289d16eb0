import math

import pytest
import torch

from meds_megatron.algorithm.corrections import importance_weights, logprob_mismatch


def test_weights_are_ratios_up_to_the_cap():
    old_T = torch.tensor([math.log(0.5), math.log(0.5), math.log(0.2), 0.0], requires_grad=True)
    rollout_T = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.4), -1000.0])
    weights_T = importance_weights(old_T, rollout_T, cap=2.0)
    torch.testing.assert_close(weights_T, torch.tensor([1.0, 2.0, 0.5, 2.0]))
    assert not weights_T.requires_grad


def test_mismatch_is_the_mean_and_the_largest_absolute_difference():
    mismatch = logprob_mismatch(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0]))
    assert mismatch == {"logprob_abs_mean": pytest.approx(0.5), "logprob_abs_max": pytest.approx(1.0)}
    assert logprob_mismatch(torch.zeros(0), torch.zeros(0)) == {"logprob_abs_mean": 0.0, "logprob_abs_max": 0.0}


def test_a_broken_logprob_is_not_hidden():
    mismatch = logprob_mismatch(torch.tensor([0.0, math.nan]), torch.zeros(2))
    assert all(math.isnan(value) for value in mismatch.values())
