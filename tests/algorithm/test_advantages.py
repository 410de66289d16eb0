import pytest
import torch

from meds_megatron.algorithm.advantages import AdvantageInputs, compute_advantages, shape_token_advantages
from meds_megatron.config import AdvantageConfig
from tests.algorithm.micro_batches import micro_batch


def advantages_of(scores_B, groups_B=None, correct_B=None, **settings) -> torch.Tensor:
    """Advantages of one group by default, all of it right."""
    groups_B = torch.zeros(len(scores_B), dtype=torch.long) if groups_B is None else groups_B
    correct_B = torch.ones(len(scores_B), dtype=torch.bool) if correct_B is None else correct_B
    inputs = AdvantageInputs(scores_B, correct_B, groups_B)
    return compute_advantages(inputs, AdvantageConfig(**settings)).advantages_B


def test_by_hand_with_the_unbiased_standard_deviation():
    # Mean 0.25, variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25, so the standard deviation is 0.5.
    advantages_B = advantages_of(torch.tensor([1.0, 0.0, 0.0, 0.0]), epsilon=1e-6)
    torch.testing.assert_close(advantages_B, torch.tensor([1.5, -0.5, -0.5, -0.5]) * (0.5 / 0.500001))


def test_without_the_standard_deviation_only_the_mean_goes():
    advantages_B = advantages_of(torch.tensor([1.0, 0.0, 0.0, 0.0]), normalize_std=False)
    torch.testing.assert_close(advantages_B, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_groups_do_not_touch_each_other_in_any_order():
    scores_B = torch.tensor([1.0, 5.0, 0.0, 7.0, 3.0])
    groups_B = torch.tensor([7, -2, 7, -2, 40])
    advantages_B = advantages_of(scores_B, groups_B, normalize_std=False)
    torch.testing.assert_close(advantages_B, torch.tensor([0.5, -1.0, -0.5, 1.0, 0.0]))


def test_a_floor_under_the_deviation_holds_in_groups_without_a_spread_in_correctness_alone():
    # Deviations: 0.1 in the first group, without a right answer; 0.1 in the second, with one; 0.5 in the third.
    scores_B = torch.tensor([0.0, -0.1, -0.2, 1.0, 0.9, 0.8, 0.0, -0.5, -1.0], dtype=torch.float64)
    correct_B = torch.tensor([False, False, False, True, False, False, False, False, False])
    groups_B = torch.tensor([4, 4, 4, 2, 2, 2, 9, 9, 9])
    inputs = AdvantageInputs(scores_B, correct_B, groups_B)
    output = compute_advantages(inputs, AdvantageConfig(std_floor=0.4))
    expected_B = torch.tensor([0.25, 0.0, -0.25, 1.0, 0.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(output.advantages_B, expected_B, rtol=1e-4, atol=1e-6)
    assert output.metrics == {"floored_share": pytest.approx(1 / 3)}

    plain = compute_advantages(inputs, AdvantageConfig())
    expected_B[:3] = torch.tensor([1.0, 0.0, -1.0])
    torch.testing.assert_close(plain.advantages_B, expected_B, rtol=1e-4, atol=1e-6)
    assert plain.metrics == {}
    empty = compute_advantages(
        AdvantageInputs(scores_B[:0], correct_B[:0], groups_B[:0]), AdvantageConfig(std_floor=0.4)
    )
    assert (empty.advantages_B.shape, empty.metrics) == ((0,), {"floored_share": 0.0})


def test_a_floor_holds_in_a_group_that_is_all_right():
    # One of sixteen right answers is over-long by a tenth: deviation 0.1 / 4, without the floor -3.75 and +0.25.
    scores_B, correct_B = torch.tensor([0.9] + [1.0] * 15, dtype=torch.float64), torch.ones(16, dtype=torch.bool)
    advantages_B = advantages_of(scores_B, correct_B=correct_B, std_floor=0.4)
    expected_B = torch.tensor([-0.09375 / 0.4] + [0.00625 / 0.4] * 15, dtype=torch.float64)
    torch.testing.assert_close(advantages_B, expected_B, rtol=1e-5, atol=0)
    plain_B = advantages_of(scores_B, correct_B=correct_B)
    torch.testing.assert_close(plain_B[:2], torch.tensor([-3.75, 0.25], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_nothing_to_compare_gives_exactly_zero(normalize_std):
    scores_B = torch.tensor([0.1] * 7 + [3.0])
    groups_B = torch.tensor([0] * 7 + [1])
    advantages_B = advantages_of(scores_B, groups_B, normalize_std=normalize_std)
    assert advantages_B.abs().max() < 1e-9
    assert advantages_B[-1] == 0
    assert advantages_of(scores_B[:0], normalize_std=normalize_std).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_have_the_type_of_the_scores(dtype):
    assert advantages_of(torch.tensor([1.0, 0.0], dtype=dtype)).dtype == dtype


def test_entropy_raises_advantages_up_to_their_bound_without_gradient():
    entropy_T = torch.tensor([0.5, 3.0, 3.0, 3.0], requires_grad=True)
    inputs = micro_batch(torch.zeros(4), torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 0.0]), entropy=entropy_T)
    shaped = shape_token_advantages(inputs, AdvantageConfig(entropy_coefficient=0.4, entropy_bound=2.0))
    torch.testing.assert_close(shaped.advantages_T, torch.tensor([1.2, 1.5, -0.5, 0.0]))
    assert not shaped.advantages_T.requires_grad
    # 0.2 + 0.5 + 0.5 + 0
    assert shaped.token_sums == {"entropy_bonus": pytest.approx(1.2)}


def test_entropy_coefficient_zero_changes_nothing():
    advantages_T = torch.tensor([1.0, -2.0])
    inputs = micro_batch(torch.zeros(2), torch.zeros(2), advantages_T, entropy=torch.tensor([3.0, 1.0]))
    shaped = shape_token_advantages(inputs, AdvantageConfig(entropy_coefficient=0.0))
    assert torch.equal(shaped.advantages_T, advantages_T)
    assert shaped.token_sums == {}
