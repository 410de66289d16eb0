"""The invariants of the schedule, on random steps."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.actor.schedule import NOT_SCHEDULED, minibatches_of, schedule
from meds_megatron.bench.synthetic import long_tailed_lengths
from meds_megatron.config import QWEN
from tests.examples import examples

ROWS = st.lists(st.tuples(st.integers(1, 500), st.integers(NOT_SCHEDULED, 3)), min_size=0, max_size=60)


def test_groups_in_order_of_appearance_form_mini_batches():
    groups_B = np.array([5, 5, 2, 2, 9, 9, 1, 1, 0, 0])
    assert minibatches_of(groups_B, 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def costs(lengths_B: np.ndarray) -> np.ndarray:
    return QWEN["Qwen2.5-7B"].token_operations(lengths_B) * lengths_B


@given(ROWS, st.integers(1, 8), st.integers(1, 1500), st.integers(1, 4))
def test_invariants(rows, ranks, tokens, multiple):
    lengths_B = np.array([length for length, _ in rows], dtype=np.int64)
    minibatches_B = np.array([minibatch for _, minibatch in rows], dtype=np.int64)
    minibatches = int(minibatches_B.max(initial=-1)) + 1
    work = schedule(lengths_B, costs(lengths_B), minibatches_B, ranks, tokens, multiple)
    scheduled = np.concatenate(work.rows)
    assert sorted(scheduled.tolist()) == np.flatnonzero(minibatches_B != NOT_SCHEDULED).tolist()
    assert all(np.all(np.diff(rank_rows) > 0) for rank_rows in work.rows)
    assert all(len(of_rank) == minibatches for of_rank in work.micro_batches)
    for minibatch in range(minibatches):
        counts = {len(of_rank[minibatch]) for of_rank in work.micro_batches}
        assert len(counts) == 1, "the same number of micro-batches on every rank"
        (count,) = counts
        assert count >= 1 and count % multiple == 0
        loads, costliest = [], costs(lengths_B)[minibatches_B == minibatch].max(initial=0.0)
        for rank_rows, of_rank in zip(work.rows, work.micro_batches, strict=True):
            packs = [rank_rows[micro_batch] for micro_batch in of_rank[minibatch]]
            assert all(len(pack) == 1 or lengths_B[pack].sum() <= tokens for pack in packs)
            assert all(np.all(np.diff(lengths_B[pack]) <= 0) for pack in packs), "costliest row first"
            expected = rank_rows[minibatches_B[rank_rows] == minibatch]
            assert sorted(np.concatenate(packs).tolist()) == expected.tolist(), "every row once, in its own mini-batch"
            loads.append(sum(costs(lengths_B[pack]).sum() for pack in packs))
            of_packs = [costs(lengths_B[pack]).sum() for pack in packs]
            cheapest = int(np.argmin(of_packs))
            if lengths_B[packs[cheapest]].sum() + lengths_B.max(initial=0) <= tokens:
                assert max(of_packs) - of_packs[cheapest] <= costliest * (1 + 1e-9)
        assert max(loads) - min(loads) <= costliest * (1 + 1e-9)


@given(ROWS, st.integers(1, 4), st.integers(1, 1500))
def test_rows_of_another_mini_batch_do_not_change_the_micro_batches(rows, ranks, tokens):
    """Responses that are only remembered leave the forward pass of the others as it is in the update."""
    lengths_B = np.array([length for length, _ in rows] + [7] * 5, dtype=np.int64)
    minibatches_B = np.array([max(minibatch, 0) for _, minibatch in rows] + [NOT_SCHEDULED] * 5, dtype=np.int64)
    alone = schedule(lengths_B, costs(lengths_B), minibatches_B, ranks, tokens)
    minibatches_B[-5:] = minibatches_B.max() + 1
    more = schedule(lengths_B, costs(lengths_B), minibatches_B, ranks, tokens)
    for rank in range(ranks):
        for minibatch, micro_batches in enumerate(alone.micro_batches[rank]):
            for one, other in zip(micro_batches, more.micro_batches[rank][minibatch], strict=True):
                assert alone.rows[rank][one].tolist() == more.rows[rank][other].tolist()


@given(st.integers(0, 2**32 - 1))
@examples(20)
def test_work_is_spread_evenly_over_ranks_and_micro_batches(seed):
    """8192 responses over 8 ranks: log-normal lengths, mean 300, longest 2000."""
    lengths_B = long_tailed_lengths(np.random.default_rng(seed), 8192)
    costs_B = costs(lengths_B)
    work = schedule(lengths_B, costs_B, np.zeros(8192, dtype=np.int64), ranks=8, micro_batch_tokens=8192)
    of_ranks = np.array([costs_B[rows].sum() for rows in work.rows])
    packs = [rows[pack] for rows, (of_rank,) in zip(work.rows, work.micro_batches, strict=True) for pack in of_rank]
    of_packs = np.array([costs_B[pack].sum() for pack in packs])
    assert of_ranks.max() / of_ranks.min() < 1.001
    assert of_packs.max() / of_packs.min() < 1.03
    again = schedule(lengths_B, costs_B, np.zeros(8192, dtype=np.int64), ranks=8, micro_batch_tokens=8192)
    assert [rows.tolist() for rows in again.rows] == [rows.tolist() for rows in work.rows]


def test_a_step_without_rows_has_no_mini_batches():
    none = np.zeros(0, dtype=np.int64)
    work = schedule(none, none, none, ranks=2, micro_batch_tokens=1)
    assert work.micro_batches == [[], []] and [len(rows) for rows in work.rows] == [0, 0]
