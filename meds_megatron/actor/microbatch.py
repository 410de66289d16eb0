"""A micro-batch as tensors: sequences one after the other, without padding between them."""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from meds_megatron.actor.train_batch import TrainBatch, offsets, take_ragged
from meds_megatron.config import ParallelLayout
from meds_megatron.model.attention import context_slice, packed_sequences


@dataclass
class MicroBatch:
    """Responses `rows` of a rank's TrainBatch, packed. Of the packed tokens T are on this context-parallel rank.

    What is left at the end is a sequence of padding.
    """

    rows: np.ndarray
    tokens_1T: Tensor
    positions_1T: Tensor
    """Position of each token in its sequence."""
    sequences: PackedSeqParams
    """Where each sequence begins and ends, all context-parallel ranks together."""
    drawn_tokens: int
    """R, those of all context-parallel ranks."""
    predictors_Q: Tensor
    """Places among the T of the tokens whose hidden states predict a drawn token."""
    targets_Q: Tensor
    """The drawn tokens that they predict."""
    drawn_Q: Tensor
    """Which of the R these are."""
    answer_rows: np.ndarray
    """Rows among `rows` that have an answer."""
    answers_N: Tensor
    """Place among the T of the token at the answer position of each of `answer_rows`; -1 on another rank."""


def sequence_tokens(batch: TrainBatch, rows: np.ndarray, layout: ParallelLayout) -> np.ndarray:
    """Tokens that each of the sequences `rows` takes in a micro-batch."""
    return -(-batch.lengths_B[rows] // layout.sequence_multiple) * layout.sequence_multiple


def build_micro_batch(
    batch: TrainBatch,
    rows: np.ndarray,
    spans_B: np.ndarray,
    tokens: int,
    device: str,
    context: tuple[int, int] = (0, 1),
) -> MicroBatch:
    """The sequences `rows`, of which each takes `spans_B` tokens, its own length or more, as a micro-batch of `tokens`
    tokens; no rows give padding alone.

    `context` is the rank and size of the context-parallel group.
    """
    begins_B1 = offsets(spans_B)
    rest = tokens - int(begins_B1[-1])
    spans = [*spans_B.tolist(), *([rest] if rest else [])]
    lengths_B = batch.lengths_B[rows]
    position_S = np.concatenate([np.zeros(0, np.int64), *map(np.arange, lengths_B)])
    place_S = np.repeat(begins_B1[:-1], lengths_B) + position_S
    packed = np.zeros(tokens, dtype=np.int64)
    packed[place_S] = take_ragged(batch.tokens_T, batch.offsets_B1, rows)
    drawn_R = place_S[take_ragged(batch.loss_mask_T, batch.offsets_B1, rows)]
    held_T = context_slice(spans, *context)
    local = np.full(tokens, -1, dtype=np.int64)
    local[held_T] = np.arange(len(held_T))
    here_Q = np.flatnonzero(local[drawn_R - 1] >= 0)
    answers_B = batch.answer_positions_B[rows]

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return MicroBatch(
        rows=rows,
        tokens_1T=tensor(packed[held_T])[None],
        positions_1T=tensor((np.arange(tokens) - np.repeat(offsets(np.array(spans))[:-1], spans))[held_T])[None],
        sequences=packed_sequences(spans, device),
        drawn_tokens=len(drawn_R),
        predictors_Q=tensor(local[drawn_R[here_Q] - 1]),
        targets_Q=tensor(packed[drawn_R[here_Q]]),
        drawn_Q=tensor(here_Q),
        answer_rows=rows[answers_B >= 0],
        answers_N=tensor(local[(begins_B1[:-1] + answers_B)[answers_B >= 0]]),
    )
