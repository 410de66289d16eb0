import pytest

from meds_megatron.errors import UserError
from meds_megatron.trainer.sync import compare


def test_equal_checksums_pass_and_others_belong_to_other_engine_ranks():
    sent = {("model.norm.weight", (0,), 0): 5, ("model.norm.weight", (0,), 1): 5}
    compare(sent, {("model.norm.weight", (0,), 1): 5}, engine=0)


def test_a_difference_names_the_tensor_and_the_place():
    sent = {("lm_head.weight", (64, 0), 1): 5}
    with pytest.raises(UserError, match=r"engine 2 \(rank 1\) has other values of lm_head.weight from \[64, 0\] on"):
        compare(sent, {("lm_head.weight", (64, 0), 1): 6}, engine=2)
