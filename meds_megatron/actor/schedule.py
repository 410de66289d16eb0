"""Rank, mini-batch and micro-batch of every response of a step. Pure numpy."""

import heapq
from dataclasses import dataclass

import numpy as np

NOT_SCHEDULED = -1


@dataclass(frozen=True)
class Schedule:
    """The work of every data-parallel rank.

    - Every row with a mini-batch is in exactly one micro-batch of one rank, in its own mini-batch; rows with mini-batch
      NOT_SCHEDULED are in none.
    - A micro-batch has at most `micro_batch_responses` rows, of like length.
    - In a mini-batch all ranks have the same number of micro-batches, at least one and a multiple of `multiple`
      (interleaved pipelines need that), filled up with empty ones: every rank takes part in every collective.
    - Within a mini-batch no rank has more tokens than another by more than the longest row.
    """

    rows: list[np.ndarray]
    """Rows of each rank, ascending."""
    micro_batches: list[list[list[np.ndarray]]]
    """By rank and mini-batch: for each micro-batch, places within the rank's `rows`, longest row first."""


def schedule(
    lengths_B: np.ndarray, minibatches_B: np.ndarray, ranks: int, micro_batch_responses: int, multiple: int = 1
) -> Schedule:
    """The schedule of B rows of `lengths_B` tokens, each in mini-batch `minibatches_B` (0, 1, ... or NOT_SCHEDULED)."""
    minibatches = int(minibatches_B.max(initial=NOT_SCHEDULED)) + 1
    shares = [_balance(lengths_B, np.flatnonzero(minibatches_B == number), ranks) for number in range(minibatches)]
    rows = [np.sort(np.concatenate([_NO_ROWS, *(share[rank] for share in shares)])) for rank in range(ranks)]
    micro_batches: list[list[list[np.ndarray]]] = [[] for _ in range(ranks)]
    for share in shares:
        most = max(-(-len(rank_rows) // micro_batch_responses) for rank_rows in share)
        count = max(1, -(-most // multiple)) * multiple
        for rank in range(ranks):
            places = np.searchsorted(rows[rank], np.sort(share[rank]))
            places = places[np.argsort(-lengths_B[rows[rank][places]], kind="stable")]
            cuts = [
                places[start : start + micro_batch_responses] for start in range(0, len(places), micro_batch_responses)
            ]
            micro_batches[rank].append(cuts + [_NO_ROWS] * (count - len(cuts)))
    return Schedule(rows, micro_batches)


def minibatches_of(groups_B: np.ndarray, prompts: int) -> np.ndarray:
    """Mini-batch of each response, int64 [B]: `prompts` groups in order of appearance make one, the last may have
    fewer."""
    _, first_B1, place_B = np.unique(groups_B, return_index=True, return_inverse=True)
    order_of_appearance = np.argsort(np.argsort(first_B1))
    return order_of_appearance[place_B] // prompts


_NO_ROWS = np.zeros(0, dtype=np.int64)


def _balance(lengths_B: np.ndarray, members: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Rows of each rank: from the longest on, each of `members` goes to the rank with the fewest tokens so far."""
    rows: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for row in members[np.argsort(-lengths_B[members], kind="stable")]:
        tokens, rank = heapq.heappop(loads)
        rows[rank].append(int(row))
        heapq.heappush(loads, (tokens + int(lengths_B[row]), rank))
    return [np.array(share, dtype=np.int64) for share in rows]
