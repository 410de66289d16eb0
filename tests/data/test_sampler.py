import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import UserError


def test_every_epoch_visits_every_problem_in_an_order_of_its_own():
    sampler = PromptSampler(50, seed=1)
    first, second = sampler.next(50), sampler.next(50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))


def test_without_shuffling_the_order_is_the_files():
    assert PromptSampler(3, seed=1, shuffle=False).next(7) == [0, 1, 2, 0, 1, 2, 0]


def test_the_seed_decides_the_order():
    assert PromptSampler(50, seed=1).next(80) == PromptSampler(50, seed=1).next(80)
    assert PromptSampler(50, seed=1).next(80) != PromptSampler(50, seed=2).next(80)


@given(size=st.integers(1, 20), takes=st.lists(st.integers(0, 30), max_size=6), rest=st.integers(0, 50))
def test_a_restored_sampler_continues_in_the_same_order(size, takes, rest):
    sampler = PromptSampler(size, seed=3)
    for count in takes:
        assert len(sampler.next(count)) == count
    restored = PromptSampler(size, seed=3)
    restored.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert restored.next(rest) == sampler.next(rest)


@given(size=st.integers(1, 20), takes=st.lists(st.integers(0, 30), max_size=6))
def test_the_size_of_requests_does_not_change_the_order(size, takes):
    sampler, whole = PromptSampler(size, seed=3), PromptSampler(size, seed=3)
    assert [index for count in takes for index in sampler.next(count)] == whole.next(sum(takes))


def test_state_over_other_data_is_refused():
    state = PromptSampler(5, seed=3).state_dict()
    with pytest.raises(UserError, match="the number of problems was 5 and is 6 now"):
        PromptSampler(6, seed=3).load_state_dict(state)
    with pytest.raises(UserError, match=r"train\.seed was 3 and is 4 now"):
        PromptSampler(5, seed=4).load_state_dict(state)
    with pytest.raises(UserError, match=r"data\.shuffle was True and is False now"):
        PromptSampler(5, seed=3, shuffle=False).load_state_dict(state)


def test_an_empty_data_set_is_refused():
    with pytest.raises(UserError, match="at least one problem"):
        PromptSampler(0, seed=0)
