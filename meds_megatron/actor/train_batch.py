"""The responses of one step as flat arrays: laid out once by the driver, cut by data-parallel rank, filled phase by
phase."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike


@dataclass
class TrainBatch:
    """B responses. Ragged tokens lie flat, one response after the other: T counts all tokens, R those that the policy
    drew, which leaves out the prompt and what a response was given. The last part of a field's name is its axis; None
    until the phase that fills it."""

    tokens_T: np.ndarray
    """int64; prompt and response of each sequence."""
    offsets_B1: np.ndarray
    """int64; sequence i is tokens_T[offsets_B1[i]:offsets_B1[i + 1]]."""
    loss_mask_T: np.ndarray
    """bool; whether the policy drew the token."""
    prompt_lengths_B: np.ndarray
    answer_positions_B: np.ndarray
    """Index within its sequence of the token whose hidden states give the fingerprint; -1 where there is no answer."""
    groups_B: np.ndarray
    """Number of the prompt that a response belongs to."""
    rollout_logprobs_R: np.ndarray
    """float32; reported by the engine for each drawn token."""
    correct_B: np.ndarray | None = None
    scores_B: np.ndarray | None = None
    """float64; correctness plus over-long penalty."""

    logprobs_R: np.ndarray | None = None
    """float32; the policy's log-probs before the first update of the step."""
    entropy_R: np.ndarray | None = None
    fingerprints_BL: np.ndarray | None = None
    """float32; one logit a layer, NaN where no answer went through the model."""

    cluster_sizes_B: np.ndarray | None = None
    """int64; earlier mistakes in the cluster that a response falls into, 0 where the memory is not looked up."""
    cluster_labels_B: np.ndarray | None = None
    penalties_B: np.ndarray | None = None
    shaped_scores_B: np.ndarray | None = None
    advantages_B: np.ndarray | None = None
    loss_weights_B: np.ndarray | None = None
    """float32; weight of each token of a response in the loss of its mini-batch."""

    def __len__(self) -> int:
        return len(self.prompt_lengths_B)

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.offsets_B1)

    @property
    def response_lengths_B(self) -> np.ndarray:
        """Tokens of each response, drawn and given."""
        return self.lengths_B - self.prompt_lengths_B

    @cached_property
    def drawn_offsets_B1(self) -> np.ndarray:
        """Drawn tokens of i are the R-arrays' [drawn_offsets_B1[i]:drawn_offsets_B1[i + 1]]."""
        return offsets(self.loss_mask_T)[self.offsets_B1]

    @property
    def drawn_lengths_B(self) -> np.ndarray:
        """Tokens of each response that the policy drew."""
        return np.diff(self.drawn_offsets_B1)

    @classmethod
    def of_responses(
        cls,
        prompts: Sequence[Sequence[int] | np.ndarray],
        responses: Sequence[Sequence[int] | np.ndarray],
        logprobs: Sequence[Sequence[float] | np.ndarray],
        answer_positions: Sequence[int],
        groups: Sequence[int],
        loss_masks: Sequence[np.ndarray] | None = None,
    ) -> "TrainBatch":
        """B responses as a batch; `answer_positions` count within the response, -1 for none. `loss_masks` say which
        tokens of each response the policy drew, whose `logprobs` these are; by default all."""
        prompt_lengths_B = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        sequences = [
            np.concatenate([np.asarray(prompt, dtype=np.int64), np.asarray(response, dtype=np.int64)])
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        masks = loss_masks or [np.ones(len(response), dtype=bool) for response in responses]
        in_sequences = [
            np.concatenate([np.zeros(len(prompt), dtype=bool), mask])
            for prompt, mask in zip(prompts, masks, strict=True)
        ]
        positions_B = np.array(answer_positions, dtype=np.int64)
        return cls(
            tokens_T=_concatenate(sequences, np.int64),
            offsets_B1=offsets(np.array([len(sequence) for sequence in sequences], dtype=np.int64)),
            loss_mask_T=_concatenate(in_sequences, np.bool_),
            prompt_lengths_B=prompt_lengths_B,
            answer_positions_B=np.where(positions_B >= 0, positions_B + prompt_lengths_B, -1),
            groups_B=np.array(groups, dtype=np.int64),
            rollout_logprobs_R=_concatenate([np.asarray(lp, dtype=np.float32) for lp in logprobs], np.float32),
        )

    @classmethod
    def concatenate(cls, batches: Sequence["TrainBatch"]) -> "TrainBatch":
        """The responses of several batches, one batch after the other; at least one batch. Raises ValueError when a
        field is filled in some of them only."""
        joined = {}
        for field in fields(cls):
            values = [getattr(batch, field.name) for batch in batches]
            present = [value is not None for value in values]
            if not any(present):
                continue
            if not all(present):
                raise ValueError(f"{field.name} is filled in some of the batches only")
            if field.name == "offsets_B1":
                joined[field.name] = offsets(np.concatenate([batch.lengths_B for batch in batches]))
            else:
                joined[field.name] = np.concatenate(values)
        return cls(**joined)

    def select(self, rows: np.ndarray) -> "TrainBatch":
        """The responses `rows`, in that order."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            axis = field.name.rpartition("_")[2]
            if value is None:
                continue
            if axis == "T":
                chosen[field.name] = take_ragged(value, self.offsets_B1, rows)
            elif axis == "R":
                chosen[field.name] = take_ragged(value, self.drawn_offsets_B1, rows)
            elif axis == "B1":
                chosen[field.name] = offsets(self.lengths_B[rows])
            else:
                chosen[field.name] = value[rows]
        return TrainBatch(**chosen)


@dataclass(frozen=True)
class ForwardOutput:
    """Results of a forward pass over B responses: float32 arrays over their drawn tokens (nats), and one
    fingerprint of L layers a response, 0 where there is no answer."""

    logprobs_R: np.ndarray
    entropy_R: np.ndarray
    fingerprints_BL: np.ndarray


@dataclass(frozen=True)
class UpdateOutput:
    """One optimizer step: its loss, sums of per-token metrics, and the whole model's gradient norm."""

    loss: float
    token_sums: dict[str, float]
    """Sums as of `LossOutput.token_sums`; empty on ranks without the last pipeline stage."""
    grad_norm: float
    learning_rate: float
    skipped: bool
    """The loss or gradient was not finite on some rank, and the weights are as before; the sums may be NaN."""


def offsets(lengths_B: np.ndarray) -> np.ndarray:
    """int64 [B + 1]; stretch i of a ragged array with these lengths is [offsets[i]:offsets[i + 1]]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths_B, dtype=np.int64)])


def take_ragged(values: np.ndarray, offsets_B1: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The stretches values[offsets_B1[row]:offsets_B1[row + 1]] of `rows`, one after the other."""
    return _concatenate([values[offsets_B1[row] : offsets_B1[row + 1]] for row in rows], values.dtype)


def scatter_ragged(parts: Sequence[np.ndarray], rows: Sequence[np.ndarray], lengths_B: np.ndarray) -> np.ndarray:
    """Per-token results of several parts in the order of all B responses.

    `parts[i]` holds the tokens of responses `rows[i]`, one after the other; together `rows` cover every response once.
    """
    order = np.concatenate(rows)
    return take_ragged(np.concatenate(parts), offsets(lengths_B[order]), np.argsort(order))


def _concatenate(arrays: list[np.ndarray], dtype: DTypeLike) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
