"""Flat arrays: selecting, concatenating and scattering keep every token with its response."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.actor.train_batch import TrainBatch, scatter_ragged
from meds_megatron.config import ParallelLayout

LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=12)


def build(lengths: list[tuple[int, int]]) -> TrainBatch:
    """Sequences of the tokens 100 * response + position, of which `is_drawn` says which the policy drew."""
    prompts = [[100 * i + t for t in range(p)] for i, (p, _) in enumerate(lengths)]
    responses = [[100 * i + p + t for t in range(r)] for i, (p, r) in enumerate(lengths)]
    return TrainBatch.of_responses(
        prompts,
        responses,
        logprobs=[[float(t) for t in tokens if is_drawn(t)] for tokens in responses],
        answer_positions=[r - 2 if r > 1 else -1 for _, r in lengths],
        groups=list(range(len(lengths))),
        loss_masks=[np.array([is_drawn(t) for t in tokens]) for tokens in responses],
    )


def is_drawn(token: int) -> bool:
    """Of every response but each third, positions 3, 4 and 5 of the sequence were given, where they are not the
    prompt's."""
    return token // 100 % 3 == 2 or token % 100 not in (3, 4, 5)


def drawn(tokens: list[int]) -> list[int]:
    return [token for token in tokens if is_drawn(token)]


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
        inside = slice(*chosen.drawn_offsets_B1[place : place + 2])
        assert chosen.rollout_logprobs_R[inside].tolist() == drawn(tokens[prompt:].tolist())
        assert chosen.response_lengths_B[place] == response


@given(LENGTHS, st.integers(0, 12))
def test_concatenated_batches_are_the_whole(lengths, cut):
    whole = build(lengths)
    whole.advantages_B = np.arange(len(lengths), dtype=np.float64)
    rows = np.arange(len(lengths))
    parts = [whole.select(part) for part in (rows[:cut], rows[cut:])]
    joined = TrainBatch.concatenate(parts)
    for field in fields(TrainBatch):
        expected, found = getattr(whole, field.name), getattr(joined, field.name)
        assert (expected is None) == (found is None), field.name
        if expected is not None:
            assert found.dtype == expected.dtype and found.tolist() == expected.tolist(), field.name


def test_a_field_of_some_batches_only_is_refused():
    one, other = build([(2, 3)]), build([(1, 4)])
    one.advantages_B = np.zeros(1)
    with pytest.raises(ValueError, match="advantages_B is filled in some of the batches only"):
        TrainBatch.concatenate([one, other])


@given(LENGTHS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_results_of_ranks_come_back_in_order(lengths, ranks, random):
    data = build(lengths)
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    shares = [np.array(rows[rank::ranks], dtype=np.int64) for rank in range(ranks)]
    parts = [data.select(share).rollout_logprobs_R for share in shares]
    assert scatter_ragged(parts, shares, data.drawn_lengths_B).tolist() == data.rollout_logprobs_R.tolist()


@given(LENGTHS, st.integers(1, 3), st.booleans(), st.randoms(use_true_random=False))
def test_a_pack_holds_its_sequences_one_after_the_other(lengths, context, wide, random):
    from meds_megatron.actor.microbatch import build_micro_batch, sequence_tokens
    from meds_megatron.model.attention import context_slice

    data, layout = build(lengths), ParallelLayout(context=context)
    rows = np.array(random.sample(range(len(lengths)), len(lengths) // 2 + 1))
    spans_B = sequence_tokens(data, rows, layout) + wide * 6 * context
    tokens = layout.padded_tokens(int(spans_B.sum()))
    packs = [build_micro_batch(data, rows, spans_B, tokens, "cpu", (rank, context)) for rank in range(context)]
    bounds = packs[0].sequences.cu_seqlens_q.tolist()
    assert bounds[: len(rows) + 1] == [0, *np.cumsum(spans_B)] and bounds[-1] == tokens
    held = [context_slice(np.diff(bounds).tolist(), rank, context) for rank in range(context)]
    assert sorted(np.concatenate(held).tolist()) == list(range(tokens))
    whole_T, positions_T = np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=np.int64)
    for pack, places in zip(packs, held, strict=True):
        whole_T[places], positions_T[places] = pack.tokens_1T[0], pack.positions_1T[0]
    for begin, row in zip(bounds, rows, strict=False):
        size = sum(lengths[row])
        assert whole_T[begin : begin + size].tolist() == [100 * row + position for position in range(size)]
        assert positions_T[begin : begin + size].tolist() == list(range(size))
    targets_R, answers = np.full(packs[0].drawn_tokens, -1), {}
    for pack, places in zip(packs, held, strict=True):
        assert whole_T[places[pack.predictors_Q.numpy()] + 1].tolist() == pack.targets_Q.tolist()
        targets_R[pack.drawn_Q.numpy()] = pack.targets_Q.numpy()
        for row, place in zip(pack.answer_rows, pack.answers_N.tolist(), strict=True):
            if place >= 0:
                answers[row] = whole_T[places[place] + 1]
    responses = [100 * row + t for row in rows for t in range(lengths[row][0], sum(lengths[row]))]
    assert targets_R.tolist() == drawn(responses)
    assert answers == {row: 100 * row + sum(lengths[row]) - 1 for row in rows if lengths[row][1] > 1}


def test_an_empty_micro_batch_is_padding():
    from meds_megatron.actor.microbatch import build_micro_batch

    none = np.zeros(0, dtype=np.int64)
    batch = build_micro_batch(build([(2, 3)]), none, none, 4, "cpu")
    assert batch.tokens_1T.tolist() == [[0] * 4] and batch.sequences.cu_seqlens_q.tolist() == [0, 4]
    assert batch.drawn_tokens == len(batch.targets_Q) == len(batch.answer_rows) == 0


def test_prompt_and_response_lists_must_match():
    with pytest.raises(ValueError, match="longer than argument 1"):
        TrainBatch.of_responses([[1]], [[2], [3]], [[0.0]], [-1], [0])
