import math
from dataclasses import replace

import pytest
import torch

from meds_megatron.algorithm.losses import policy_loss
from meds_megatron.config import PolicyConfig
from tests.algorithm.micro_batches import gradient, micro_batch, random_micro_batch

LOG2 = math.log(2.0)
RATIOS = micro_batch(
    # Ratios 2, 1/2, 2 and 1/2; the mean of four tokens.
    logprobs=[-1.0 + LOG2, -1.0 - LOG2, -1.0 + LOG2, -1.0 - LOG2],
    old_logprobs=[-1.0, -1.0, -1.0, -1.0],
    advantages=[1.0, 1.0, -1.0, -1.0],
    weights=[0.25] * 4,
)


@pytest.mark.parametrize(
    ("clip_low", "clip_high", "weights", "clipped"),
    [
        (1.0, 0.28, [1.28, 0.5, 1.28, 0.5], 2),  # as published: no lower bound
        (0.2, 0.28, [1.28, 0.8, 1.28, 0.8], 4),
        (1.0, 4.0, [2.0, 0.5, 2.0, 0.5], 0),
    ],
)
def test_by_hand(clip_low, clip_high, weights, clipped):
    output = policy_loss(RATIOS, PolicyConfig(loss="cispo", clip_low=clip_low, clip_high=clip_high))
    # Loss of a token: -weight A log pi, with log pi = -1 + ln 2 for ratio 2 and -1 - ln 2 for ratio 1/2. Advantages
    # of 1 and -1 cancel here: the loss is 0, but its gradient, -weight A / 4, is not, clipped or not.
    losses = [
        -weights[0] * 1.0 * (-1.0 + LOG2),
        -weights[1] * 1.0 * (-1.0 - LOG2),
        weights[2] * 1.0 * (-1.0 + LOG2),
        weights[3] * 1.0 * (-1.0 - LOG2),
    ]
    assert output.loss.item() == pytest.approx(sum(losses) / 4, abs=1e-12)
    expected = [-weights[0] / 4, -weights[1] / 4, weights[2] / 4, weights[3] / 4]
    assert gradient(RATIOS, output.loss).tolist() == pytest.approx(expected)
    # Ratios 2 + 1/2 + 2 + 1/2; k3: twice (2 - 1 - ln 2) and twice (1/2 - 1 + ln 2).
    assert {name: value.item() for name, value in output.token_sums.items()} == pytest.approx(
        {"tokens": 4.0, "ratio": 5.0, "clip_fraction": clipped, "kl": 1.0}
    )


def test_loss_of_one_token_by_hand():
    # Ratio 2, weight 1.28, A = 0.5, log pi = -1 + ln 2 = -0.30685: loss 1.28 * 0.5 * 0.30685, gradient -1.28 * 0.5.
    inputs = micro_batch([-1.0 + LOG2], [-1.0], [0.5])
    output = policy_loss(inputs, PolicyConfig(loss="cispo"))
    assert output.loss.item() == pytest.approx(0.19638580, abs=1e-7)
    assert gradient(inputs, output.loss).item() == pytest.approx(-0.64)


def test_tokens_that_ppo_clips_keep_a_gradient():
    settings = dict(clip_low=0.2, clip_high=0.28)
    ppo, cispo = (
        gradient(RATIOS, policy_loss(RATIOS, PolicyConfig(loss=name, **settings)).loss) for name in ("ppo", "cispo")
    )
    assert (ppo == 0).tolist() == [True, False, False, True]
    assert (cispo != 0).all()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_gradient_against_finite_differences_at_fixed_weights(aggregation):
    inputs = random_micro_batch(aggregation, token_advantages=True)
    output = policy_loss(inputs, PolicyConfig(loss="cispo"))
    ratio_T = inputs.logprobs_T.detach().exp() / inputs.old_logprobs_T.exp()
    fixed_T = ratio_T.clamp(0.8, 1.28)
    assert 0 < output.token_sums["clip_fraction"].item() == (fixed_T != ratio_T).sum() < len(fixed_T)

    def objective(logprobs_T):
        return -(inputs.weights_T * fixed_T * inputs.advantages_T * logprobs_T).sum()

    torch.testing.assert_close(output.loss, objective(inputs.logprobs_T))
    step = 1e-6
    differences = []
    for token in range(len(fixed_T)):
        shift_T = torch.zeros_like(fixed_T)
        shift_T[token] = step
        up, down = objective(inputs.logprobs_T + shift_T), objective(inputs.logprobs_T - shift_T)
        differences.append((up - down).item() / (2 * step))
    expected_T = torch.tensor(differences, dtype=torch.float64)
    torch.testing.assert_close(gradient(inputs, output.loss), expected_T, rtol=1e-6, atol=1e-9)


def test_response_boundaries_do_not_matter():
    config = PolicyConfig(loss="cispo")
    inputs = random_micro_batch("token_mean")
    apart = replace(inputs, lengths_B=torch.ones(len(inputs.logprobs_T), dtype=torch.long))
    assert policy_loss(inputs, config).loss == policy_loss(apart, config).loss
