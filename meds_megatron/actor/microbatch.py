"""A micro-batch as tensors: sequences one after the other, without padding between them."""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from meds_megatron.actor.train_batch import TrainBatch, offsets, take_ragged
from meds_megatron.model.attention import packed_sequences


@dataclass
class MicroBatch:
    """Responses `rows` of a rank's TrainBatch, packed into T tokens; what is left of T is padding.

    The padding is a sequence of its own behind the others.
    """

    rows: np.ndarray
    tokens_1T: Tensor
    positions_1T: Tensor
    """Position of each token in its sequence."""
    sequences: PackedSeqParams
    """Where each sequence begins and ends."""
    predictors_R: Tensor
    """For each response token, the place among the T of the token whose hidden state predicts it."""
    targets_R: Tensor
    """The response tokens themselves."""
    answer_rows: np.ndarray
    """Those of `rows` that have an answer."""
    answers_N: Tensor
    """Place among the T of the token at the answer position of each of `answer_rows`."""


def packed_tokens(batch: TrainBatch, rows: np.ndarray) -> int:
    """Tokens that the sequences `rows` take in a micro-batch."""
    return int(batch.lengths_B[rows].sum())


def build_micro_batch(batch: TrainBatch, rows: np.ndarray, tokens: int, device: str) -> MicroBatch:
    """The sequences `rows` packed into `tokens` tokens, which must have room for them; no rows give padding alone."""
    lengths_B = batch.lengths_B[rows]
    begins_B1 = offsets(lengths_B)
    padding = tokens - int(begins_B1[-1])
    lengths = [*lengths_B.tolist(), *([padding] if padding else [])]
    tokens_T = np.concatenate([take_ragged(batch.tokens_T, batch.offsets_B1, rows), np.zeros(padding, np.int64)])
    positions_T = np.arange(tokens) - np.repeat(offsets(np.array(lengths))[:-1], lengths)
    prompts_B, places = batch.prompt_lengths_B[rows], np.arange(tokens)
    is_response_T = positions_T >= np.repeat([*prompts_B.tolist(), *([padding] if padding else [])], lengths)
    responses_R = places[is_response_T]
    answers_B = batch.answer_positions_B[rows]
    has_answer_B = answers_B >= 0

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device)

    return MicroBatch(
        rows=rows,
        tokens_1T=tensor(tokens_T)[None],
        positions_1T=tensor(positions_T)[None],
        sequences=packed_sequences(lengths, device),
        predictors_R=tensor(responses_R - 1),
        targets_R=tensor(tokens_T[responses_R]),
        answer_rows=rows[has_answer_B],
        answers_N=tensor((begins_B1[:-1] + answers_B)[has_answer_B]),
    )
