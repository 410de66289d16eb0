"""The responses of one step as flat arrays: what the driver cuts by data-parallel rank and the ranks work on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass
class StepData:
    """B responses. Ragged tokens lie flat behind one another: T over whole sequences, R over response tokens only.

    Arrays that a later phase fills are None until then.
    """

    tokens_T: np.ndarray
    """int64; prompt and response of each sequence, one sequence after the other."""
    offsets_B1: np.ndarray
    """int64; sequence i is tokens_T[offsets_B1[i]:offsets_B1[i + 1]]."""
    prompt_lengths_B: np.ndarray
    answer_positions_B: np.ndarray
    """Index within its sequence of the token that holds the `{` of the last box; -1 where there is no fingerprint."""
    groups_B: np.ndarray
    """Which prompt of the step a response answers."""
    rollout_logprobs_R: np.ndarray
    """float32; what the engine reported for each response token."""
    memory_shards_B: np.ndarray | None = None
    """Which memory shard gets the response's fingerprint, -1 for none."""
    memory_rows_B: np.ndarray | None = None
    """The number under which that shard knows the response in this step, -1 for none."""
    minibatches_B: np.ndarray | None = None
    """Which optimizer step of this training step a response takes part in."""
    minibatch_tokens_M: np.ndarray | None = None
    """Response tokens of each whole mini-batch, over all data-parallel ranks."""
    minibatch_responses_M: np.ndarray | None = None
    logprobs_R: np.ndarray | None = None
    """float32; the trainer's log-probs before the first update of the step."""
    entropy_R: np.ndarray | None = None
    advantages_B: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_lengths_B)

    @property
    def lengths_B(self) -> np.ndarray:
        return np.diff(self.offsets_B1)

    @property
    def response_lengths_B(self) -> np.ndarray:
        return self.lengths_B - self.prompt_lengths_B

    @property
    def response_offsets_B1(self) -> np.ndarray:
        """Response tokens of i are the R-arrays' [response_offsets_B1[i]:response_offsets_B1[i + 1]]."""
        return _offsets(self.response_lengths_B)

    @classmethod
    def of_responses(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        answer_positions: list[int],
        groups: list[int],
    ) -> "StepData":
        """Lays B responses flat; `answer_positions` count within the response, -1 for none."""
        prompt_lengths_B = np.array([len(p) for p in prompts], dtype=np.int64)
        sequences = [
            np.concatenate([np.asarray(p, dtype=np.int64), np.asarray(r, dtype=np.int64)])
            for p, r in zip(prompts, responses, strict=True)
        ]
        positions_B = np.array(answer_positions, dtype=np.int64)
        return cls(
            tokens_T=_concatenate(sequences, np.int64),
            offsets_B1=_offsets(np.array([len(s) for s in sequences], dtype=np.int64)),
            prompt_lengths_B=prompt_lengths_B,
            answer_positions_B=np.where(positions_B >= 0, positions_B + prompt_lengths_B, -1),
            groups_B=np.array(groups, dtype=np.int64),
            rollout_logprobs_R=_concatenate([np.asarray(lp, dtype=np.float32) for lp in logprobs], np.float32),
        )

    def select(self, rows: np.ndarray) -> "StepData":
        """The responses `rows`, in that order."""
        chosen = {}
        for field in fields(self):
            value = getattr(self, field.name)
            kind = field.name.rpartition("_")[2]
            if value is None or kind == "M":
                chosen[field.name] = value
            elif kind == "T":
                chosen[field.name] = take_ragged(value, self.offsets_B1, rows)
            elif kind == "R":
                chosen[field.name] = take_ragged(value, self.response_offsets_B1, rows)
            elif kind == "B1":
                chosen[field.name] = _offsets(self.lengths_B[rows])
            else:
                chosen[field.name] = value[rows]
        return StepData(**chosen)


def scatter_ragged(parts: list[np.ndarray], rows: list[np.ndarray], lengths_B: np.ndarray) -> np.ndarray:
    """Puts flat per-token results of several ranks back in the order of all B responses.

    `parts[d]` holds the tokens of responses `rows[d]`, one after the other; together `rows` cover every response once.
    """
    order = np.concatenate(rows)
    return take_ragged(np.concatenate(parts), _offsets(lengths_B[order]), np.argsort(order))


def _offsets(lengths_B: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths_B, dtype=np.int64)])


def _concatenate(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)


def take_ragged(values: np.ndarray, offsets_B1: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The stretches values[offsets_B1[row]:offsets_B1[row + 1]] of `rows`, one after the other."""
    return _concatenate([values[offsets_B1[row] : offsets_B1[row + 1]] for row in rows], values.dtype)
