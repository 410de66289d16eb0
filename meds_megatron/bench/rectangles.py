"""Micro-batches as padded rectangles, the usual form, to compare packed ones with."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

from meds_megatron.actor import pipeline
from meds_megatron.actor.microbatch import MicroBatch
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.model.attention import packed_sequences


@contextmanager
def padded_rectangles() -> Iterator[None]:
    """While open, every micro-batch of this process is a rectangle instead of a pack."""
    with mock.patch.multiple(pipeline, packed_tokens=rectangle_tokens, build_micro_batch=build_rectangle):
        yield


def rectangle_tokens(batch: TrainBatch, rows: np.ndarray) -> int:
    """Tokens of `rows` with prompts padded to the longest prompt and responses to the longest response."""
    return len(rows) * _width(batch, rows)


def build_rectangle(batch: TrainBatch, rows: np.ndarray, tokens: int, device: str) -> MicroBatch:
    """The sequences `rows`, each with padding behind it up to the width of the rectangle.

    Causal attention keeps the padding from the tokens before it, but computes it.
    """
    width, count = _width(batch, rows), len(rows)
    tokens_T, predictors, targets, answers = np.zeros(tokens, dtype=np.int64), [], [], []
    for place, row in enumerate(rows):
        sequence = batch.tokens_T[batch.offsets_B1[row] : batch.offsets_B1[row + 1]]
        begin, prompt = place * width, batch.prompt_lengths_B[row]
        tokens_T[begin : begin + len(sequence)] = sequence
        predictors.append(begin + np.arange(prompt - 1, len(sequence) - 1))
        targets.append(sequence[prompt:])
        if batch.answer_positions_B[row] >= 0:
            answers.append(begin + batch.answer_positions_B[row])
    rest = tokens - count * width
    lengths = [width] * count + ([rest] if rest else [])

    def joined(parts: list) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts])).to(device)

    return MicroBatch(
        rows=rows,
        tokens_1T=torch.from_numpy(tokens_T).to(device)[None],
        positions_1T=torch.cat([torch.arange(length) for length in lengths]).to(device)[None],
        sequences=packed_sequences(lengths, device),
        predictors_R=joined(predictors),
        targets_R=joined(targets),
        answer_rows=rows[batch.answer_positions_B[rows] >= 0],
        answers_N=torch.tensor(answers, dtype=torch.int64, device=device),
    )


def _width(batch: TrainBatch, rows: np.ndarray) -> int:
    return int(batch.prompt_lengths_B[rows].max(initial=0) + batch.response_lengths_B[rows].max(initial=0))
