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
    - A micro-batch has at most `micro_batch_tokens` tokens, or one row that is longer.
    - In a mini-batch all ranks have the same number of micro-batches, at least one and a multiple of `multiple`
      (interleaved pipelines need that), some of them empty where there are few rows: every rank takes part in every
      collective.
    - Within a mini-batch no rank's rows cost more than another's by more than the costliest row, and of a rank's
      micro-batches none costs more than another by more than that, unless the other has no room for it.
    """

    rows: list[np.ndarray]
    """Rows of each rank, ascending."""
    micro_batches: list[list[list[np.ndarray]]]
    """Micro-batches by rank and mini-batch: places within the rank's `rows`, costliest row first."""


def schedule(
    lengths_B: np.ndarray,
    costs_B: np.ndarray,
    minibatches_B: np.ndarray,
    ranks: int,
    micro_batch_tokens: int,
    multiple: int = 1,
) -> Schedule:
    """The schedule of B rows of `lengths_B` tokens, each in mini-batch `minibatches_B` (0, 1, ... or NOT_SCHEDULED).

    `costs_B` is what a row takes to compute, in any unit; it grows with the length.
    """
    minibatches = int(minibatches_B.max(initial=NOT_SCHEDULED)) + 1
    rows: list[list[np.ndarray]] = [[_NO_ROWS] for _ in range(ranks)]
    packs: list[list[list[np.ndarray]]] = [[] for _ in range(ranks)]
    for number in range(minibatches):
        members = np.flatnonzero(minibatches_B == number)
        shares = _balance(members[np.argsort(-costs_B[members], kind="stable")], costs_B, ranks, lengths_B)
        assert shares is not None  # Without a capacity every row fits.
        for rank, of_rank in enumerate(_pack(shares, lengths_B, costs_B, micro_batch_tokens, multiple)):
            rows[rank].append(shares[rank])
            packs[rank].append(of_rank)
    sorted_rows = [np.sort(np.concatenate(of_rank)) for of_rank in rows]
    micro_batches = [
        [[np.searchsorted(sorted_rows[rank], pack) for pack in of_minibatch] for of_minibatch in packs[rank]]
        for rank in range(ranks)
    ]
    return Schedule(sorted_rows, micro_batches)


def minibatches_of(groups_B: np.ndarray, prompts: int) -> np.ndarray:
    """Mini-batch of each response, int64 [B]: `prompts` groups in order of appearance make one, the last may have
    fewer."""
    _, first_B1, place_B = np.unique(groups_B, return_index=True, return_inverse=True)
    order_of_appearance = np.argsort(np.argsort(first_B1))
    return order_of_appearance[place_B] // prompts


_NO_ROWS = np.zeros(0, dtype=np.int64)


def _pack(
    shares: list[np.ndarray], lengths_B: np.ndarray, costs_B: np.ndarray, tokens: int, multiple: int
) -> list[list[np.ndarray]]:
    """Each rank's micro-batches of at most `tokens` tokens, as few as hold all ranks' shares of a mini-batch."""
    fewest = max(min(len(share), -(-int(lengths_B[share].sum()) // tokens)) for share in shares)
    count = max(1, -(-fewest // multiple)) * multiple
    while True:
        packs = [_balance(share, costs_B, count, lengths_B, tokens) for share in shares]
        full = [pack for pack in packs if pack is not None]
        if len(full) == len(packs):
            return full
        count += multiple


def _balance(
    rows: np.ndarray, costs_B: np.ndarray, bins: int, lengths_B: np.ndarray, capacity: float = np.inf
) -> list[np.ndarray] | None:
    """Rows of each bin: each of `rows`, the costliest first, goes to the bin that has cost least so far and has room
    for it, or is empty. None when a row fits into no bin."""
    chosen: list[list[int]] = [[] for _ in range(bins)]
    loads = [(0.0, number) for number in range(bins)]
    room = [capacity] * bins
    for row, cost in zip(rows.tolist(), costs_B[rows].tolist(), strict=True):
        full = []
        while loads and chosen[loads[0][1]] and lengths_B[row] > room[loads[0][1]]:
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, number = loads[0]
        chosen[number].append(row)
        heapq.heapreplace(loads, (load + cost, number))
        room[number] -= lengths_B[row]
        for bin_load in full:
            heapq.heappush(loads, bin_load)
    return [np.array(share, dtype=np.int64) for share in chosen]
