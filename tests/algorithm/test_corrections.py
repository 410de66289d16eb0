import math

import pytest
import torch
from torch import Tensor

from meds_megatron.algorithm.corrections import importance_weights, logprob_mismatch
from meds_megatron.algorithm.losses import policy_loss
from meds_megatron.config import PolicyConfig
from tests.algorithm.micro_batches import micro_batch


def test_token_weights_are_ratios_up_to_the_cap():
    old_T = torch.tensor([math.log(0.5), math.log(0.5), math.log(0.2), 0.0], requires_grad=True)
    rollout_T = torch.tensor([math.log(0.5), math.log(0.1), math.log(0.4), -1000.0])
    weights_T = importance_weights(old_T, rollout_T, torch.tensor([4]), PolicyConfig(importance="token"))
    torch.testing.assert_close(weights_T, torch.tensor([1.0, 2.0, 0.5, 2.0]))
    assert not weights_T.requires_grad


def test_sequence_weights_are_products_of_ratios():
    old_T = torch.tensor([0.5, 0.5, 0.2, 0.3]).log()
    rollout_T = torch.tensor([0.25, 0.25, 0.4, 0.2]).log()
    config = PolicyConfig(importance="sequence", importance_cap=None)
    weights_T = importance_weights(old_T, rollout_T, torch.tensor([2, 0, 1, 1]), config)
    torch.testing.assert_close(weights_T, torch.tensor([4.0, 4.0, 0.5, 1.5]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 5.0, [1.0, 5.0, 0.5, 0.0, 0.0]),
        (None, 1.0, [1.0, 0.0, 0.5, 0.0, 0.1]),
        (1.0, None, [1.0, 5.0, 0.0, 6.0, 0.0]),
    ],
)
def test_what_lies_outside_of_the_bounds_is_left_out(low, high, expected):
    ratios_T = torch.tensor([1.0, 5.0, 0.5, 6.0, 0.1], dtype=torch.float64)
    # A step inside: log and exp are not exact.
    ratios_T = ratios_T + torch.tensor([0.0, -1e-9, 1e-9, 0.0, 0.0])
    config = PolicyConfig(importance="token", importance_cap=None, importance_low=low, importance_high=high)
    weights_T = importance_weights(ratios_T.log(), torch.zeros(5), torch.tensor([5]), config)
    torch.testing.assert_close(weights_T, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


class TwoTokens:
    """All responses of two tokens from an alphabet of three, in one micro-batch, each as often as an older policy draws
    it: sums over it are exact expectations."""

    responses_N2 = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    rewards_N = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, -1.0, 0.5, 0.0, -2.0], dtype=torch.float64)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.old = self._logits(generator)
        self.present = [(values + 1.5 * noise) for values, noise in zip(self.old, self._logits(generator), strict=True)]
        for logits in self.present:
            logits.requires_grad_()

    @staticmethod
    def _logits(generator: torch.Generator) -> list[Tensor]:
        """Logits of the first token, and of the second by the first."""
        return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3,), (3, 3))]

    def logprobs_N2(self, logits: list[Tensor]) -> Tensor:
        first_N, second_N = self.responses_N2.T
        return torch.stack([logits[0].log_softmax(-1)[first_N], logits[1].log_softmax(-1)[first_N, second_N]], dim=1)

    def exact_gradient(self, weight=None) -> list[Tensor]:
        """Gradient of the expected reward; with `weight`, of what is left of it when ratios r become weight(r)."""
        logprobs_N = self.logprobs_N2(self.present).sum(1)
        old_N = self.logprobs_N2(self.old).sum(1)
        ratio_N = (logprobs_N - old_N).detach().exp()
        weights_N = old_N.exp() * (ratio_N if weight is None else weight(ratio_N))
        return torch.autograd.grad((weights_N * self.rewards_N * logprobs_N).sum(), self.present)

    def loss_gradient(self, config: PolicyConfig) -> list[Tensor]:
        """Gradient of the expected loss when the older policy draws the responses."""
        logprobs_T, rollout_T = self.logprobs_N2(self.present).flatten(), self.logprobs_N2(self.old).flatten()
        inputs = micro_batch(
            logprobs_T,
            logprobs_T.detach(),
            self.rewards_N.repeat_interleave(2),
            weights=self.logprobs_N2(self.old).sum(1).exp().repeat_interleave(2),
            lengths=[2] * 9,
            rollout_logprobs=rollout_T,
        )
        return torch.autograd.grad(-policy_loss(inputs, config).loss, self.present)


def test_the_expected_gradient_is_exact_with_sequence_weights_and_wrong_without():
    policies = TwoTokens()
    exact = policies.exact_gradient()
    # The gradient of the expected reward, without importance sampling.
    probs_N = policies.logprobs_N2(policies.present).sum(1).exp()
    plain = torch.autograd.grad((probs_N * policies.rewards_N).sum(), policies.present)
    torch.testing.assert_close(exact, plain)
    corrected = policies.loss_gradient(PolicyConfig(importance="sequence", importance_cap=None))
    torch.testing.assert_close(corrected, exact)
    uncorrected = policies.loss_gradient(PolicyConfig())
    error = max(float((one - other).abs().max()) for one, other in zip(uncorrected, exact, strict=True))
    assert error > 0.2 * max(float(one.abs().max()) for one in exact)


def test_the_expected_gradient_with_truncation_and_bounds():
    policies = TwoTokens()
    truncated = policies.loss_gradient(PolicyConfig(importance="sequence", importance_cap=1.2))
    torch.testing.assert_close(truncated, policies.exact_gradient(lambda ratio_N: ratio_N.clamp(max=1.2)))
    config = PolicyConfig(importance="sequence", importance_cap=None, importance_low=0.5, importance_high=2.0)
    expected = policies.exact_gradient(lambda ratio_N: ratio_N * (ratio_N >= 0.5) * (ratio_N <= 2.0))
    torch.testing.assert_close(policies.loss_gradient(config), expected)


def test_mismatch_is_the_mean_and_the_largest_absolute_difference():
    mismatch = logprob_mismatch(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.0, -2.5, -2.0]))
    assert mismatch == {"logprob_abs_mean": pytest.approx(0.5), "logprob_abs_max": pytest.approx(1.0)}
    assert logprob_mismatch(torch.zeros(0), torch.zeros(0)) == {"logprob_abs_mean": 0.0, "logprob_abs_max": 0.0}


def test_a_broken_logprob_is_not_hidden():
    mismatch = logprob_mismatch(torch.tensor([0.0, math.nan]), torch.zeros(2))
    assert all(math.isnan(value) for value in mismatch.values())
