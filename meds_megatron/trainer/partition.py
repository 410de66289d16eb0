"""Which responses form a mini-batch, and which data-parallel rank works on them. Pure functions."""

import heapq

import numpy as np


def minibatches_of(groups_B: np.ndarray, prompts: int) -> np.ndarray:
    """The mini-batch of each response, int64 [B]: `prompts` groups in a row make one, the last may have fewer."""
    _, first_B1, place_B = np.unique(groups_B, return_index=True, return_inverse=True)
    order_of_appearance = np.argsort(np.argsort(first_B1))
    return order_of_appearance[place_B] // prompts


def balance(lengths_B: np.ndarray, minibatches_B: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Rows of each data-parallel rank: in every mini-batch, the longest response goes to the rank with least tokens.

    Every response goes to exactly one rank. A rank may get none of a mini-batch that has fewer responses than ranks.
    """
    rows: list[list[int]] = [[] for _ in range(ranks)]
    for minibatch in np.unique(minibatches_B):
        loads = [(0, rank) for rank in range(ranks)]
        members = np.flatnonzero(minibatches_B == minibatch)
        for row in members[np.argsort(-lengths_B[members], kind="stable")]:
            tokens, rank = heapq.heappop(loads)
            rows[rank].append(int(row))
            heapq.heappush(loads, (tokens + int(lengths_B[row]), rank))
    return [np.array(sorted(share), dtype=np.int64) for share in rows]
