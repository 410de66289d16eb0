import torch

from meds_megatron.algorithm.group_filter import keep_groups


def test_groups_without_a_spread_are_dropped():
    accuracy_B = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    groups_B = torch.tensor([3, 3, 8, 8, 5, 5, 3])
    assert keep_groups(accuracy_B, groups_B).tolist() == [True, True, False, False, False, False, True]


def test_equal_fractions_have_no_spread_though_their_mean_rounds():
    assert not keep_groups(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long)).any()


def test_booleans_are_a_metric_and_a_group_of_one_is_kept():
    assert keep_groups(torch.tensor([False, False, True]), torch.tensor([0, 0, 1])).tolist() == [False, False, True]


def test_responses_left_out_count_neither_as_right_nor_as_wrong():
    # Spread among those left; none left; one left; the spread is with one left out; a group of one, and without it.
    metric_B = torch.tensor([1.0, 0.0, torch.nan, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    groups_B = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 5])
    counted_B = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    keep_B = keep_groups(metric_B, groups_B, counted_B)
    assert keep_B.tolist() == [True] * 3 + [False] * 2 + [False] * 2 + [False] * 3 + [True, False]


def test_no_responses_give_no_answer():
    assert keep_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
