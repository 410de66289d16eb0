"""Flat arrays: cutting, choosing and putting back keep every token with its response."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.actor import microbatch
from meds_megatron.actor.step_data import StepData, scatter_ragged

LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=12)


def build(lengths: list[tuple[int, int]]) -> StepData:
    """Sequences whose tokens tell where they belong: 100 * response + position."""
    prompts = [[100 * i + t for t in range(p)] for i, (p, _) in enumerate(lengths)]
    responses = [[100 * i + p + t for t in range(r)] for i, (p, r) in enumerate(lengths)]
    data = StepData.of_responses(
        prompts,
        responses,
        logprobs=[[float(t) for t in tokens] for tokens in responses],
        answer_positions=[r - 2 if r > 1 else -1 for _, r in lengths],
        groups=list(range(len(lengths))),
    )
    data.minibatches_B = np.arange(len(lengths)) % 2
    return data


@given(LENGTHS, st.randoms(use_true_random=False))
def test_selected_responses_keep_their_tokens(lengths, random):
    data = build(lengths)
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    chosen = data.select(np.array(rows[: len(rows) // 2 + 1]))
    for place, row in enumerate(rows[: len(rows) // 2 + 1]):
        prompt, response = lengths[row]
        start = chosen.offsets_B1[place]
        tokens = chosen.tokens_T[start : start + prompt + response]
        assert tokens.tolist() == [100 * row + t for t in range(prompt + response)]
        begin = chosen.response_offsets_B1[place]
        assert chosen.rollout_logprobs_R[begin : begin + response].tolist() == tokens[prompt:].tolist()


@given(LENGTHS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_results_of_ranks_come_back_in_order(lengths, ranks, random):
    data = build(lengths)
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    shares = [np.array(rows[rank::ranks], dtype=np.int64) for rank in range(ranks)]
    parts = [data.select(share).rollout_logprobs_R for share in shares]
    assert scatter_ragged(parts, shares, data.response_lengths_B).tolist() == data.rollout_logprobs_R.tolist()


@given(LENGTHS, st.integers(1, 5), st.integers(1, 4))
def test_micro_batches_hold_every_response_once(lengths, size, multiple):
    data = build(lengths)
    plan = microbatch.cut(data.lengths_B, data.minibatches_B, 3, size, multiple)
    assert len(plan) == 3, "a rank without a response in a mini-batch joins it with empty micro-batches"
    for minibatch, parts in enumerate(plan):
        assert len(parts) % multiple == 0 and len(parts) > 0
        assert all(len(part) <= size for part in parts)
        rows = sorted(int(row) for part in parts for row in part)
        assert rows == np.flatnonzero(data.minibatches_B == minibatch).tolist()


@given(LENGTHS, st.integers(1, 4))
def test_predicting_positions_come_one_before_their_targets(lengths, pad_to):
    data = build(lengths)
    batch = microbatch.build(data, np.arange(len(lengths)), pad_to, "cpu")
    count, width = batch.tokens_BS.shape
    assert width % pad_to == 0
    positions, sequences = batch.predictors_R // count, batch.predictors_R % count
    assert batch.tokens_BS[sequences, positions + 1].tolist() == batch.targets_R.tolist()
    answers = batch.tokens_BS[batch.answer_sequence_N, batch.answer_position_N + 1]
    assert answers.tolist() == [100 * row + sum(lengths[row]) - 1 for row in batch.answer_rows]


def test_an_empty_micro_batch_still_has_a_sequence():
    batch = microbatch.build(build([(2, 3)]), np.zeros(0, dtype=np.int64), 4, "cpu")
    assert batch.tokens_BS.shape == (1, 4)
    assert len(batch.targets_R) == len(batch.answer_rows) == 0


def test_prompt_and_response_lists_must_match():
    with pytest.raises(ValueError):
        StepData.of_responses([[1]], [[2], [3]], [[0.0]], [-1], [0])
