"""Properties of every policy loss."""

import math

import pytest
import torch

from meds_megatron.algorithm.losses import LOSSES, policy_loss
from meds_megatron.config import PolicyConfig
from meds_megatron.config.load import schema_choices
from meds_megatron.errors import UserError
from tests.algorithm.micro_batches import gradient, micro_batch, random_micro_batch, responses

every_loss = pytest.mark.parametrize("loss", LOSSES)
every_aggregation = pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])


def test_the_config_names_exactly_the_losses_there_are():
    assert set(schema_choices()["policy.loss"]) == set(LOSSES)


@every_loss
@every_aggregation
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(loss, aggregation):
    inputs = random_micro_batch(aggregation, noise=0.0, token_advantages=True)
    output = policy_loss(inputs, PolicyConfig(loss=loss))
    assert torch.equal(gradient(inputs, output.loss), -inputs.weights_T * inputs.advantages_T)
    sums = {name: value.item() for name, value in output.token_sums.items()}
    assert sums["ratio"] == sums["tokens"] == 34
    assert sums["kl"] == sums["clip_fraction"] == sums.get("dual_clip_fraction", 0) == 0


@every_loss
@every_aggregation
@pytest.mark.parametrize("cut", [(8,), (4, 4), (1,) * 8, (3, 5), (0, 8)])
@pytest.mark.parametrize("importance", ["none", "token", "sequence"])
def test_however_a_mini_batch_is_cut_its_loss_gradient_and_metrics_stay(loss, aggregation, cut, importance):
    config = PolicyConfig(loss=loss, importance=importance, importance_cap=1.5, importance_low=0.5)
    inputs = random_micro_batch(aggregation, token_advantages=True)
    whole = policy_loss(inputs, config)
    whole_gradient_T = gradient(inputs, whole.loss)

    ends = torch.tensor(cut).cumsum(0).tolist()
    parts = [policy_loss(responses(inputs, end - count, end), config) for count, end in zip(cut, ends, strict=True)]
    sum(part.loss for part in parts).backward()
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-9)
    torch.testing.assert_close(inputs.logprobs_T.grad, whole_gradient_T)
    for name, value in whole.token_sums.items():
        assert sum(part.token_sums[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-6)


@every_loss
def test_importance_weights_scale_each_tokens_loss(loss):
    inputs = random_micro_batch("token_mean")
    plain = policy_loss(inputs, PolicyConfig(loss=loss))
    capped = policy_loss(inputs, PolicyConfig(loss=loss, importance="token", importance_cap=1.5))
    weights_T = (inputs.old_logprobs_T - inputs.rollout_logprobs_T).exp().clamp(max=1.5)
    assert 0 < (weights_T == 1.5).sum() < len(weights_T)
    torch.testing.assert_close(gradient(inputs, capped.loss), gradient(inputs, plain.loss) * weights_T)
    sums = {name: value.item() for name, value in capped.token_sums.items()}
    assert sums.pop("importance_weight") == pytest.approx(weights_T.sum().item())
    assert sums.pop("importance_square") == pytest.approx((weights_T**2).sum().item())
    assert sums.pop("importance_dropped") == 0
    assert sums == {name: value.item() for name, value in plain.token_sums.items()}


@every_loss
def test_tokens_of_weight_zero_count_nowhere(loss):
    inputs = micro_batch([-1.0, -9.0], [-1.0, -1.0], [1.0, 1.0], weights=[1.0, 0.0], lengths=[1, 1])
    output = policy_loss(inputs, PolicyConfig(loss=loss))
    assert gradient(inputs, output.loss).tolist() == [-1.0, 0.0]
    assert output.loss.item() == (1.0 if loss == "cispo" else -1.0)
    sums = {name: value.item() for name, value in output.token_sums.items()}
    assert sums == {"tokens": 1.0, "ratio": 1.0, "kl": 0.0} | {name: 0.0 for name in sums if "clip" in name}


@every_loss
def test_a_micro_batch_without_responses_has_loss_zero(loss):
    inputs = micro_batch([], [], [], lengths=torch.zeros(0, dtype=torch.long))
    output = policy_loss(inputs, PolicyConfig(loss=loss, importance="token"))
    assert output.loss.item() == 0.0
    assert all(value.item() == 0.0 for value in output.token_sums.values())
    assert gradient(inputs, output.loss).shape == (0,)


@every_loss
def test_metrics_are_float32_scalars_without_gradient(loss):
    output = policy_loss(random_micro_batch("token_mean"), PolicyConfig(loss=loss))
    assert {"tokens", "kl", "ratio", "clip_fraction"} <= set(output.token_sums)
    for value in output.token_sums.values():
        assert (value.dtype, value.shape, value.requires_grad) == (torch.float32, (), False)


@every_loss
@pytest.mark.parametrize("log_ratio", [500.0, -500.0])
def test_a_runaway_ratio_stays_finite(loss, log_ratio):
    logprobs_T = torch.tensor([log_ratio - 1.0])
    inputs = micro_batch(logprobs_T, torch.tensor([-1.0]), torch.tensor([-1.0]))
    output = policy_loss(inputs, PolicyConfig(loss=loss, dual_clip=None))
    assert math.isfinite(output.loss.item()) and math.isfinite(gradient(inputs, output.loss).item())


@every_loss
def test_kl_is_the_k3_estimate_of_each_token(loss):
    log2 = math.log(2.0)
    inputs = micro_batch([log2 - 1.0, -log2 - 1.0], [-1.0, -1.0], [1.0, 1.0])
    kl = policy_loss(inputs, PolicyConfig(loss=loss)).token_sums["kl"].item()
    assert kl == pytest.approx((2.0 - 1.0 - log2) + (0.5 - 1.0 + log2))


def test_a_users_loss_that_is_none_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from meds_megatron.algorithm.losses import LossOutput\n"
        "def number(inputs, config):\n    return inputs.logprobs_T.sum()\n"
        "def silent(inputs, config):\n    return LossOutput(inputs.logprobs_T.sum(), {})\n"
    )
    for name, found in (("number", "Tensor"), ("silent", "LossOutput")):
        with pytest.raises(UserError, match=rf"policy\.loss is .*:{name}, which gave {found}, expected a LossOutput"):
            policy_loss(random_micro_batch(0), PolicyConfig(loss=f"{tmp_path}/mine.py:{name}"))
