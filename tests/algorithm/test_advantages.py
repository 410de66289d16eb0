import pytest
import torch

from meds_megatron.algorithm.advantages import entropy_shaped, group_advantages, std_floor


def test_by_hand_with_the_unbiased_standard_deviation():
    # Mean 0.25, variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25, so the standard deviation is 0.5.
    scores_B = torch.tensor([1.0, 0.0, 0.0, 0.0])
    advantages_B = group_advantages(scores_B, torch.zeros(4, dtype=torch.long), normalize_std=True, epsilon=1e-6)
    torch.testing.assert_close(advantages_B, torch.tensor([1.5, -0.5, -0.5, -0.5]) * (0.5 / 0.500001))


def test_without_the_standard_deviation_only_the_mean_goes():
    scores_B = torch.tensor([1.0, 0.0, 0.0, 0.0])
    advantages_B = group_advantages(scores_B, torch.zeros(4, dtype=torch.long), normalize_std=False)
    torch.testing.assert_close(advantages_B, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_groups_do_not_touch_each_other_in_any_order():
    scores_B = torch.tensor([1.0, 5.0, 0.0, 7.0, 3.0])
    groups_B = torch.tensor([7, -2, 7, -2, 40])
    advantages_B = group_advantages(scores_B, groups_B, normalize_std=False)
    torch.testing.assert_close(advantages_B, torch.tensor([0.5, -1.0, -0.5, 1.0, 0.0]))


def test_a_floor_under_the_deviation_holds_in_groups_without_a_right_answer_alone():
    # Deviations: 0.1 in the first group, without a right answer; 0.1 in the second, with one; 0.5 in the third.
    scores_B = torch.tensor([0.0, -0.1, -0.2, 1.0, 0.9, 0.8, 0.0, -0.5, -1.0], dtype=torch.float64)
    correct_B = torch.tensor([False, False, False, True, False, False, False, False, False])
    groups_B = torch.tensor([4, 4, 4, 2, 2, 2, 9, 9, 9])
    least_std_B = std_floor(correct_B, groups_B, 0.4)
    assert least_std_B.tolist() == pytest.approx([0.4] * 3 + [0.0] * 3 + [0.4] * 3)
    advantages_B = group_advantages(scores_B, groups_B, normalize_std=True, least_std_B=least_std_B)
    expected_B = torch.tensor([0.25, 0.0, -0.25, 1.0, 0.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(advantages_B, expected_B, rtol=1e-4, atol=1e-6)
    plain_B = group_advantages(scores_B, groups_B, normalize_std=True)
    assert torch.equal(plain_B, group_advantages(scores_B, groups_B, normalize_std=True, least_std_B=0.0))
    assert std_floor(correct_B[:0], groups_B[:0], 0.4).shape == (0,)


@pytest.mark.parametrize("normalize_std", [True, False])
def test_nothing_to_compare_gives_exactly_zero(normalize_std):
    scores_B = torch.tensor([0.1] * 7 + [3.0])
    groups_B = torch.tensor([0] * 7 + [1])
    advantages_B = group_advantages(scores_B, groups_B, normalize_std=normalize_std)
    assert advantages_B.abs().max() < 1e-9
    assert advantages_B[-1] == 0
    assert group_advantages(scores_B[:0], groups_B[:0], normalize_std=normalize_std).shape == (0,)


def test_entropy_raises_advantages_up_to_their_bound_without_gradient():
    advantages_T = torch.tensor([1.0, 1.0, -1.0, 0.0])
    entropy_T = torch.tensor([0.5, 3.0, 3.0, 3.0], requires_grad=True)
    shaped_T = entropy_shaped(advantages_T, entropy_T, 0.4, 2.0)
    torch.testing.assert_close(shaped_T, torch.tensor([1.2, 1.5, -0.5, 0.0]))
    assert not shaped_T.requires_grad


def test_entropy_coefficient_zero_changes_nothing():
    advantages_T = torch.tensor([1.0, -2.0])
    assert torch.equal(entropy_shaped(advantages_T, torch.tensor([3.0, 1.0]), 0.0, 2.0), advantages_T)
