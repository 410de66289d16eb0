import math

import pytest
import torch

from meds_megatron.algorithm.losses import policy_loss, token_weights
from meds_megatron.config import PolicyConfig

LOG2 = math.log(2.0)
ONE = torch.ones(1)


def loss_of(log_ratio: float, advantage: float, **settings) -> tuple[float, float, dict[str, float]]:
    """(loss, d loss / d logprob, sums) of a single token of weight 1."""
    logprobs_T = torch.tensor([log_ratio - 1.0], requires_grad=True)
    output = policy_loss(logprobs_T, torch.tensor([-1.0]), ONE * advantage, ONE, PolicyConfig(**settings))
    output.loss.backward()
    return output.loss.item(), logprobs_T.grad.item(), {name: value.item() for name, value in output.sums.items()}


def test_on_policy_the_gradient_is_the_advantage_and_kl_is_nothing():
    loss, gradient, sums = loss_of(0.0, 0.7)
    assert (loss, gradient) == pytest.approx((-0.7, -0.7))
    assert sums == {"tokens": 1.0, "clipped": 0.0, "dual_clipped": 0.0, "ratio": 1.0, "kl": 0.0}


def test_clip_higher_lets_rare_good_tokens_rise_further():
    inside, outside = math.log(1.27), math.log(1.3)
    assert loss_of(inside, 1.0)[:2] == pytest.approx((-1.27, -1.27))
    loss, gradient, sums = loss_of(outside, 1.0)
    assert (loss, gradient, sums["clipped"]) == pytest.approx((-1.28, 0.0, 1.0))
    assert loss_of(math.log(1.27), 1.0, clip_high=0.2)[0] == pytest.approx(-1.2)


def test_a_good_token_that_fell_is_not_clipped_and_a_bad_one_is():
    assert loss_of(-LOG2, 1.0)[:2] == pytest.approx((-0.5, -0.5))
    loss, gradient, sums = loss_of(-LOG2, -1.0)
    assert (loss, gradient, sums["clipped"]) == pytest.approx((0.8, 0.0, 1.0))


def test_dual_clip_holds_bad_tokens_only():
    log20 = math.log(20.0)
    loss, gradient, sums = loss_of(log20, -1.0)
    assert (loss, gradient, sums["dual_clipped"]) == pytest.approx((10.0, 0.0, 1.0))
    assert loss_of(log20, -1.0, dual_clip=None)[:2] == pytest.approx((20.0, 20.0))
    assert loss_of(log20, 1.0)[2]["dual_clipped"] == 0.0


def test_a_runaway_ratio_stays_finite():
    loss, gradient, _ = loss_of(500.0, -1.0, dual_clip=None)
    assert math.isfinite(loss) and math.isfinite(gradient)


def test_kl_is_the_k3_estimate():
    assert loss_of(LOG2, 1.0)[2]["kl"] == pytest.approx(2.0 - 1.0 - LOG2)
    assert loss_of(-LOG2, 1.0)[2]["kl"] == pytest.approx(0.5 - 1.0 + LOG2)


def test_importance_weights_scale_the_loss():
    config = PolicyConfig()
    logprobs_T = torch.tensor([-1.0, -1.0], requires_grad=True)
    ones_T = torch.ones(2)
    output = policy_loss(logprobs_T, logprobs_T.detach(), ones_T, ones_T, config, torch.tensor([0.5, 2.0]))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-2.5)
    assert logprobs_T.grad.tolist() == pytest.approx([-0.5, -2.0])


def test_tokens_of_weight_zero_count_nowhere():
    logprobs_T = torch.tensor([-1.0, -9.0])
    output = policy_loss(logprobs_T, torch.full((2,), -1.0), torch.ones(2), torch.tensor([1.0, 0.0]), PolicyConfig())
    assert output.loss.item() == -1.0
    assert output.sums["tokens"].item() == 1.0
    assert output.sums["kl"].item() == 0.0


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Two responses of 1 and 3 tokens, each token's loss being 1 and 2 respectively.
        ("token_mean", (1 + 2 * 3) / 4),
        ("sequence_mean", (1 + 2) / 2),
        ("sequence_sum", (1 / 10 + 6 / 10) / 2),
    ],
)
def test_the_three_normalisers_by_hand(loss, expected):
    lengths_B = torch.tensor([1, 3])
    weights_B = token_weights(lengths_B, loss, total_tokens=4, total_responses=2, max_response_tokens=10)
    losses_T = torch.tensor([1.0, 2.0, 2.0, 2.0])
    assert (weights_B.repeat_interleave(lengths_B) * losses_T).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("cut", [(8,), (4, 4), (1,) * 8, (3, 5)])
def test_however_a_mini_batch_is_cut_its_loss_and_gradient_stay(loss, cut):
    generator = torch.Generator().manual_seed(0)
    lengths_B = torch.tensor([5, 1, 7, 2, 9, 3, 3, 4])
    tokens = int(lengths_B.sum())
    old_T, rollout_noise_T, advantages_T = torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    logprobs_T = (old_T + 0.5 * rollout_noise_T).requires_grad_()

    def run(sizes: tuple[int, ...]) -> tuple[float, torch.Tensor]:
        logprobs_T.grad = None
        total, start = 0.0, 0
        for part_lengths_B in lengths_B.split(sizes):
            totals = dict(total_tokens=tokens, total_responses=8, max_response_tokens=16)
            weights_T = token_weights(part_lengths_B, loss, **totals).double().repeat_interleave(part_lengths_B)
            here = slice(start, start + int(part_lengths_B.sum()))
            output = policy_loss(logprobs_T[here], old_T[here], advantages_T[here], weights_T, PolicyConfig())
            output.loss.backward()
            total, start = total + output.loss.item(), here.stop
        return total, logprobs_T.grad

    whole_loss, whole_gradient_T = run((8,))
    loss_sum, gradient_T = run(cut)
    assert loss_sum == pytest.approx(whole_loss, rel=1e-9)
    torch.testing.assert_close(gradient_T, whole_gradient_T)
