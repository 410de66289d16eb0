import math
from dataclasses import replace

import pytest
import torch

from meds_megatron.algorithm.losses import policy_loss
from meds_megatron.config import PolicyConfig
from tests.algorithm.micro_batches import gradient, micro_batch, random_micro_batch

LOG2 = math.log(2.0)


def test_by_hand():
    # Response 1: A = 1, token ratios 2 and 8, so s = sqrt(2 * 8) = 4, below 1 + clip_high = 4.5: -A s = -4.
    # Response 2: A = -1, token ratio 1/2, so s = 1/2, clipped to 1 - clip_low = 0.8: max(0.5, 0.8) = 0.8.
    # Mean of the two responses (weights 1/2 / 2, 1/2 / 2 and 1/2): (-4 + 0.8) / 2 = -1.6.
    # Gradient (eq. 10): -A s / |y| / 2 = -4 / 2 / 2 = -1 on both tokens of response 1, 0 on the clipped one.
    inputs = micro_batch(
        logprobs=[-1.0 + LOG2, -3.0 + 3 * LOG2, -2.0 - LOG2],
        old_logprobs=[-1.0, -3.0, -2.0],
        advantages=[1.0, 1.0, -1.0],
        weights=[0.25, 0.25, 0.5],
        lengths=[2, 1],
    )
    output = policy_loss(inputs, PolicyConfig(loss="gspo", clip_low=0.2, clip_high=3.5))
    assert output.loss.item() == pytest.approx(-1.6)
    assert gradient(inputs, output.loss).tolist() == pytest.approx([-1.0, -1.0, 0.0])
    # Per token: ratios 4 + 4 + 1/2; k3 of the token ratios (2 - 1 - ln 2) + (8 - 1 - 3 ln 2) + (1/2 - 1 + ln 2).
    assert {name: value.item() for name, value in output.token_sums.items()} == pytest.approx(
        {"tokens": 3.0, "ratio": 8.5, "clip_fraction": 1.0, "dual_clip_fraction": 0.0, "kl": 7.5 - 3 * LOG2}
    )


@pytest.mark.parametrize(
    ("mean_log_ratio", "advantage", "clipped"),
    [
        # exp(3.9e-4) = 1.00039008 and exp(4.1e-4) = 1.00041008; exp(-2.9e-4) and exp(-3.1e-4) likewise around 0.9997.
        (3.9e-4, 1.0, False),
        (4.1e-4, 1.0, True),
        (4.1e-4, -1.0, False),
        (-2.9e-4, -1.0, False),
        (-3.1e-4, -1.0, True),
        (-3.1e-4, 1.0, False),
    ],
)
def test_a_response_is_clipped_as_a_whole_by_its_mean_log_ratio(mean_log_ratio, advantage, clipped):
    # Single tokens are 1.5 nats off in both directions.
    logprobs_T = torch.tensor([1.5, -1.5, 0.0], dtype=torch.float64) + mean_log_ratio
    inputs = micro_batch(logprobs_T, torch.zeros(3, dtype=torch.float64), advantages=[advantage] * 3)
    output = policy_loss(inputs, PolicyConfig(loss="gspo", clip_low=3e-4, clip_high=4e-4))
    bound = 1.0004 if advantage > 0 else 0.9997
    ratio = bound if clipped else math.exp(mean_log_ratio)
    assert output.loss.item() == pytest.approx(-3 * advantage * ratio, rel=1e-12)
    assert output.token_sums["clip_fraction"].item() == (3.0 if clipped else 0.0)
    slope = 0.0 if clipped else -advantage * math.exp(mean_log_ratio)
    assert gradient(inputs, output.loss).tolist() == pytest.approx([slope] * 3, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_value_and_gradient_of_the_sequence_level_objective(aggregation):
    # Equation 5 as it stands, response by response, with autograd through s.
    inputs = random_micro_batch(aggregation, noise=0.3)
    config = PolicyConfig(loss="gspo", clip_low=0.05, clip_high=0.05)
    output = policy_loss(inputs, config)
    values = (inputs.logprobs_T, inputs.old_logprobs_T, inputs.advantages_T, inputs.weights_T)
    parts = [values_T.split(inputs.lengths_B.tolist()) for values_T in values]
    expected, clipped = 0.0, 0
    for new_T, old_T, advantages_T, weights_T in zip(*parts, strict=True):
        s = (new_T.sum() - old_T.sum()).div(len(new_T)).exp()
        objective = torch.minimum(s * advantages_T[0], s.clamp(0.95, 1.05) * advantages_T[0])
        expected = expected - weights_T.sum() * objective
        clipped += len(new_T) * int(objective < s * advantages_T[0])
    assert 0 < clipped < len(inputs.logprobs_T)
    assert output.token_sums["clip_fraction"].item() == clipped
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradient(inputs, output.loss), gradient(inputs, expected))


def test_gradient_against_finite_differences():
    inputs = random_micro_batch("sequence_mean", noise=0.3)
    config = PolicyConfig(loss="gspo", clip_low=0.05, clip_high=0.05)
    assert torch.autograd.gradcheck(
        lambda new_T: policy_loss(replace(inputs, logprobs_T=new_T), config).loss, inputs.logprobs_T
    )


def test_advantages_of_single_tokens_reach_the_gradient_of_these_tokens():
    # Equation 17: -w_t A_t s, here with s = sqrt(2 * 1/8) = 1/2.
    inputs = micro_batch([LOG2, -3 * LOG2], [0.0, 0.0], advantages=[1.0, 0.25], weights=[0.5, 0.5])
    output = policy_loss(inputs, PolicyConfig(loss="gspo"))
    assert output.loss.item() == pytest.approx(-0.5 * (1.0 + 0.25) * 0.5)
    assert gradient(inputs, output.loss).tolist() == pytest.approx([-0.25, -0.0625])


def test_responses_do_not_touch_each_other():
    # The same tokens as one response of two and as two of one.
    inputs = micro_batch([LOG2, -LOG2], [0.0, 0.0], advantages=[1.0, 1.0])
    config = PolicyConfig(loss="gspo", clip_high=2.0)
    together = policy_loss(inputs, config)
    apart = policy_loss(replace(inputs, lengths_B=torch.tensor([1, 1])), config)
    assert gradient(inputs, together.loss).tolist() == pytest.approx([-1.0, -1.0])
    assert gradient(inputs, apart.loss).tolist() == pytest.approx([-2.0, -0.5])


def test_dual_clip_holds_bad_responses():
    inputs = micro_batch([math.log(20.0)] * 2, [0.0, 0.0], advantages=[-1.0, -1.0])
    output = policy_loss(inputs, PolicyConfig(loss="gspo"))
    assert (output.loss.item(), output.token_sums["dual_clip_fraction"].item()) == pytest.approx((20.0, 2.0))
    assert policy_loss(inputs, PolicyConfig(loss="gspo", dual_clip=None)).loss.item() == pytest.approx(40.0)


def test_lengths_that_do_not_add_up_to_the_tokens_are_an_error():
    inputs = micro_batch([0.0] * 3, [0.0] * 3, advantages=[1.0] * 3, lengths=[1, 1])
    with pytest.raises(RuntimeError):
        policy_loss(inputs, PolicyConfig(loss="gspo"))
