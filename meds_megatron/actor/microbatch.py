"""A micro-batch as padded tensors: the only place that pads."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from meds_megatron.actor.train_batch import TrainBatch


@dataclass
class MicroBatch:
    """Responses `rows` of a rank's TrainBatch, padded on the right to S tokens."""

    rows: np.ndarray
    tokens_BS: Tensor
    positions_BS: Tensor
    predictors_R: Tensor
    """For each response token, the index of the hidden state that predicts it in a flattened [S * B, H]."""
    targets_R: Tensor
    """The response tokens themselves."""
    answer_rows: np.ndarray
    """Those of `rows` that have an answer."""
    answer_sequence_N: Tensor
    """Sequence of each of `answer_rows` within the micro-batch."""
    answer_position_N: Tensor
    """Position of each answer within its sequence."""


def build_micro_batch(batch: TrainBatch, rows: np.ndarray, pad_to: int, device: str) -> MicroBatch:
    """The sequences `rows`, padded to a common length that `pad_to` divides. No rows give one sequence of padding."""
    lengths = batch.lengths_B[rows]
    width = -(-int(lengths.max(initial=1)) // pad_to) * pad_to
    count = max(1, len(rows))
    tokens_BS = np.zeros((count, width), dtype=np.int64)
    predictors, targets, answer_rows, answer_sequence = [], [], [], []
    for place, row in enumerate(rows):
        sequence = batch.tokens_T[batch.offsets_B1[row] : batch.offsets_B1[row + 1]]
        tokens_BS[place, : len(sequence)] = sequence
        prompt = batch.prompt_lengths_B[row]
        predictors.append(np.arange(prompt - 1, len(sequence) - 1) * count + place)
        targets.append(sequence[prompt:])
        if batch.answer_positions_B[row] >= 0:
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
        answer_position_N=torch.from_numpy(batch.answer_positions_B[answer_rows]).to(device),
    )
