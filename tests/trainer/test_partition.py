"""Mini-batches and shares of data-parallel ranks."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.trainer.partition import balance, minibatches_of


def test_groups_in_a_row_make_a_mini_batch():
    groups_B = np.array([5, 5, 2, 2, 9, 9, 1, 1, 0, 0])
    assert minibatches_of(groups_B, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 4))
def test_every_response_has_one_rank_and_loads_are_even(lengths, ranks, minibatches):
    lengths_B = np.array(lengths)
    minibatches_B = np.arange(len(lengths)) % minibatches
    rows = balance(lengths_B, minibatches_B, ranks)
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    for minibatch in range(minibatches):
        loads = [int(lengths_B[share[minibatches_B[share] == minibatch]].sum()) for share in rows]
        # Of greedy shares, none is above another by more than the longest response.
        assert max(loads) - min(loads) <= max(lengths)
