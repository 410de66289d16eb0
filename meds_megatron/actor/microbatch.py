"""Cuts a rank's responses into micro-batches and pads each to a rectangle: the one place that knows padding."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meds_megatron.actor.step_data import StepData


@dataclass
class MicroBatch:
    """Some responses of a rank, padded on the right to S tokens. `rows` are their places in the rank's StepData."""

    rows: np.ndarray
    tokens_BS: Tensor
    positions_BS: Tensor
    predictors_R: Tensor
    """For each response token, where its predicting hidden state lies in a flattened [S * B, H]."""
    targets_R: Tensor
    """The response tokens themselves."""
    answer_rows: np.ndarray
    """Rows (of the rank's StepData) that have a fingerprint."""
    answer_sequence_N: Tensor
    """For each of `answer_rows`: its sequence in this micro-batch ..."""
    answer_position_N: Tensor
    """... and the position of the answer within it."""


def cut(
    lengths_B: np.ndarray, minibatches_B: np.ndarray, minibatches: int, size: int, multiple: int
) -> list[list[np.ndarray]]:
    """Rows of each micro-batch, by mini-batch: sequences of like length together, at most `size` in one.

    The number of micro-batches in a mini-batch is a multiple of `multiple` (interleaved pipelines need that), filled up
    with empty ones; a rank without a response in a mini-batch gets empty ones too, so that it joins every collective.
    """
    plan = []
    for minibatch in range(minibatches):
        rows = np.flatnonzero(minibatches_B == minibatch)
        rows = rows[np.argsort(-lengths_B[rows], kind="stable")]
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        missing = max(multiple, -(-len(parts) // multiple) * multiple) - len(parts)
        plan.append(parts + [np.zeros(0, dtype=np.int64)] * missing)
    return plan


def build(data: StepData, rows: np.ndarray, pad_to: int, device: str) -> MicroBatch:
    """Pads the sequences `rows` to a common length that `pad_to` divides. No rows give one sequence of padding."""
    lengths = data.lengths_B[rows]
    width = -(-int(lengths.max(initial=1)) // pad_to) * pad_to
    count = max(1, len(rows))
    tokens_BS = np.zeros((count, width), dtype=np.int64)
    predictors, targets, answer_rows, answer_sequence = [], [], [], []
    for place, row in enumerate(rows):
        sequence = data.tokens_T[data.offsets_B1[row] : data.offsets_B1[row + 1]]
        tokens_BS[place, : len(sequence)] = sequence
        prompt = data.prompt_lengths_B[row]
        predictors.append(np.arange(prompt - 1, len(sequence) - 1) * count + place)
        targets.append(sequence[prompt:])
        if data.answer_positions_B[row] >= 0:
            answer_rows.append(row)
            answer_sequence.append(place)
    none = [np.zeros(0, dtype=np.int64)]
    answer_rows = np.array(answer_rows, dtype=np.int64)
    return MicroBatch(
        rows=rows,
        tokens_BS=torch.from_numpy(tokens_BS).to(device),
        positions_BS=torch.arange(width, device=device).expand(count, width),
        predictors_R=torch.from_numpy(np.concatenate(predictors or none)).to(device),
        targets_R=torch.from_numpy(np.concatenate(targets or none)).to(device),
        answer_rows=answer_rows,
        answer_sequence_N=torch.tensor(answer_sequence, dtype=torch.int64, device=device),
        answer_position_N=torch.from_numpy(data.answer_positions_B[answer_rows]).to(device),
    )


def stream(data: StepData, plan: list[np.ndarray], pad_to: int, device: str) -> Iterator[MicroBatch]:
    """The micro-batches of `plan` one by one, padded only when they are asked for."""
    return (build(data, rows, pad_to, device) for rows in plan)
