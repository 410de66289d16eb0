import math

import pytest
import torch

from meds_megatron.algorithm.losses import policy_loss
from meds_megatron.config import PolicyConfig
from tests.algorithm.micro_batches import gradient, micro_batch, random_micro_batch

LOG2 = math.log(2.0)


def loss_of(log_ratio: float, advantage: float, **settings) -> tuple[float, float, dict[str, float]]:
    """(loss, d loss / d logprob, metric sums) of a single token of weight 1."""
    inputs = micro_batch([log_ratio - 1.0], [-1.0], [advantage])
    output = policy_loss(inputs, PolicyConfig(**settings))
    sums = {name: value.item() for name, value in output.token_sums.items()}
    return output.loss.item(), gradient(inputs, output.loss).item(), sums


def test_on_policy_the_gradient_is_the_advantage_and_kl_is_zero():
    loss, slope, sums = loss_of(0.0, 0.7)
    assert (loss, slope) == pytest.approx((-0.7, -0.7))
    assert sums == {"tokens": 1.0, "clip_fraction": 0.0, "dual_clip_fraction": 0.0, "ratio": 1.0, "kl": 0.0}


def test_clip_higher_lets_rare_good_tokens_rise_further():
    inside, outside = math.log(1.27), math.log(1.3)
    assert loss_of(inside, 1.0)[:2] == pytest.approx((-1.27, -1.27))
    loss, slope, sums = loss_of(outside, 1.0)
    assert (loss, slope, sums["clip_fraction"]) == pytest.approx((-1.28, 0.0, 1.0))
    assert loss_of(math.log(1.27), 1.0, clip_high=0.2)[0] == pytest.approx(-1.2)


def test_a_good_token_that_fell_is_not_clipped_and_a_bad_one_is():
    assert loss_of(-LOG2, 1.0)[:2] == pytest.approx((-0.5, -0.5))
    loss, slope, sums = loss_of(-LOG2, -1.0)
    assert (loss, slope, sums["clip_fraction"]) == pytest.approx((0.8, 0.0, 1.0))


def test_dual_clip_holds_bad_tokens_only():
    log20 = math.log(20.0)
    loss, slope, sums = loss_of(log20, -1.0)
    assert (loss, slope, sums["dual_clip_fraction"]) == pytest.approx((10.0, 0.0, 1.0))
    assert loss_of(log20, -1.0, dual_clip=None)[:2] == pytest.approx((20.0, 20.0))
    assert loss_of(log20, 1.0)[2]["dual_clip_fraction"] == 0.0


def test_importance_weights_are_those_of_trainer_over_engine_up_to_the_cap():
    # p_trainer / p_rollout is 1/2 and 4; the cap is 2.
    inputs = micro_batch([-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], rollout_logprobs=[-1.0 + LOG2, -1.0 - 2 * LOG2])
    output = policy_loss(inputs, PolicyConfig(importance="token", importance_cap=2.0))
    assert output.loss.item() == pytest.approx(-2.5)
    assert gradient(inputs, output.loss).tolist() == pytest.approx([-0.5, -2.0])


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gradient_against_finite_differences(dual_clip):
    inputs = random_micro_batch("sequence_mean", token_advantages=True)
    config = PolicyConfig(dual_clip=dual_clip)

    def loss(logprobs_T):
        return policy_loss(micro_batch(logprobs_T, inputs.old_logprobs_T, inputs.advantages_T), config).loss

    assert torch.autograd.gradcheck(loss, inputs.logprobs_T)
