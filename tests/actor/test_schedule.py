"""The invariants of the schedule, on random steps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.actor.schedule import NOT_SCHEDULED, minibatches_of, schedule

ROWS = st.lists(st.tuples(st.integers(1, 500), st.integers(NOT_SCHEDULED, 3)), min_size=0, max_size=60)


def test_groups_in_order_of_appearance_form_mini_batches():
    groups_B = np.array([5, 5, 2, 2, 9, 9, 1, 1, 0, 0])
    assert minibatches_of(groups_B, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@given(ROWS, st.integers(1, 8), st.integers(1, 5), st.integers(1, 4))
def test_invariants(rows, ranks, size, multiple):
    lengths_B = np.array([length for length, _ in rows], dtype=np.int64)
    minibatches_B = np.array([minibatch for _, minibatch in rows], dtype=np.int64)
    minibatches = int(minibatches_B.max(initial=-1)) + 1
    work = schedule(lengths_B, minibatches_B, ranks, size, multiple)
    scheduled = np.concatenate(work.rows)
    assert sorted(scheduled.tolist()) == np.flatnonzero(minibatches_B != NOT_SCHEDULED).tolist()
    assert all(np.all(np.diff(rank_rows) > 0) for rank_rows in work.rows)
    assert all(len(of_rank) == minibatches for of_rank in work.micro_batches)
    for minibatch in range(minibatches):
        counts = {len(of_rank[minibatch]) for of_rank in work.micro_batches}
        assert len(counts) == 1, "the same number of micro-batches on every rank"
        (count,) = counts
        assert count >= 1 and count % multiple == 0
        tokens = []
        for rank_rows, of_rank in zip(work.rows, work.micro_batches, strict=True):
            assert all(len(micro_batch) <= size for micro_batch in of_rank[minibatch])
            taken = np.concatenate([rank_rows[micro_batch] for micro_batch in of_rank[minibatch]])
            expected = rank_rows[minibatches_B[rank_rows] == minibatch]
            assert sorted(taken.tolist()) == expected.tolist(), "every row once, in its own mini-batch"
            assert np.all(np.diff(lengths_B[taken]) <= 0), "rows of like length are neighbours"
            tokens.append(int(lengths_B[taken].sum()))
        assert max(tokens) - min(tokens) <= lengths_B[minibatches_B == minibatch].max(initial=0)


@given(ROWS, st.integers(1, 4), st.integers(1, 5))
def test_rows_of_another_mini_batch_do_not_change_the_micro_batches(rows, ranks, size):
    """Responses that are only remembered leave the forward pass of the others as it is in the update."""
    lengths_B = np.array([length for length, _ in rows] + [7] * 5, dtype=np.int64)
    minibatches_B = np.array([max(minibatch, 0) for _, minibatch in rows] + [NOT_SCHEDULED] * 5, dtype=np.int64)
    alone = schedule(lengths_B, minibatches_B, ranks, size)
    minibatches_B[-5:] = minibatches_B.max() + 1
    more = schedule(lengths_B, minibatches_B, ranks, size)
    for rank in range(ranks):
        for minibatch, micro_batches in enumerate(alone.micro_batches[rank]):
            for one, other in zip(micro_batches, more.micro_batches[rank][minibatch], strict=True):
                assert alone.rows[rank][one].tolist() == more.rows[rank][other].tolist()


def test_a_step_without_rows_has_no_mini_batches():
    work = schedule(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), ranks=2, micro_batch_responses=1)
    assert work.micro_batches == [[], []] and [len(rows) for rows in work.rows] == [0, 0]
