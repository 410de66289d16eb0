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


def test_no_responses_give_no_answer():
    assert keep_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
