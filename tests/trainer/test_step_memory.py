"""Fingerprints reach their shard in pieces from many ranks: the memory is the same on every layout."""

import numpy as np
import pytest

from meds_megatron.actor.handover import cut_by_shard
from meds_megatron.actor.step_data import StepData
from meds_megatron.config import MemoryConfig
from meds_megatron.memory import MemoryShard, shard_of
from meds_megatron.trainer.step_memory import StepMemory

LAYERS = 16
RESPONSES = 120


def draw(step: int) -> tuple[list[str], np.ndarray]:
    """Keys and fingerprints [N, L] of a step; those of keys `unboxed` are not to be had."""
    rng = np.random.default_rng(step)
    habits = np.random.default_rng(0).normal(size=(4, LAYERS))
    keys = [f"{number}|wrong{'|no_answer' if rng.random() < 0.2 else ''}" for number in rng.integers(7, size=RESPONSES)]
    return keys, (habits[rng.integers(4, size=RESPONSES)] + 0.1 * rng.normal(size=(RESPONSES, LAYERS))).astype("f4")


def pieces_of(keys: list[str], fingerprints_NL: np.ndarray, numbers: np.ndarray, shards: int, ranks: int, rng):
    """What each rank hands over, of responses that were dealt out in any order."""
    order = rng.permutation(RESPONSES)
    for rows in (order[rank::ranks] for rank in range(ranks)):
        boxed_B = np.array([not keys[row].endswith("no_answer") for row in rows])
        data = StepData.of_responses([[1]] * len(rows), [[2]] * len(rows), [[0.0]] * len(rows), [0] * len(rows), rows)
        data.memory_shards_B = np.where(boxed_B, [shard_of(keys[row], shards) for row in rows], -1)
        data.memory_rows_B = np.where(boxed_B, numbers[rows], -1)
        yield cut_by_shard(fingerprints_NL[rows], data)


def sizes_on(ranks: int, steps: int = 4) -> list[list[int]]:
    """Sizes of every lookup of a run over `ranks` ranks and as many shards; two lookups a step, half remembered."""
    rng = np.random.default_rng(100 + ranks)
    memories = [StepMemory(MemoryConfig(), rank, ranks) for rank in range(ranks)]
    found = []
    for step in range(steps):
        for batch in range(2):
            keys, fingerprints_NL = draw(2 * step + batch)
            numbers = batch * RESPONSES + np.arange(RESPONSES)
            pieces = list(pieces_of(keys, fingerprints_NL, numbers, ranks, ranks, rng))
            sizes_N = np.zeros(RESPONSES, dtype=np.int64)
            for shard, memory in enumerate(memories):
                rows = [row for row in range(RESPONSES) if shard_of(keys[row], ranks) == shard]
                mine = [of_rank[shard] for of_rank in pieces if shard in of_rank]
                sizes_N[rows] = memory.lookup(numbers[rows].tolist(), [keys[row] for row in rows], *mine)
            found.append(sizes_N.tolist())
        for shard, memory in enumerate(memories):
            chosen = [
                number
                for number in rng.permutation(2 * RESPONSES).tolist()
                if number % 2 == 0
                and shard_of(draw(2 * step + number // RESPONSES)[0][number % RESPONSES], ranks) == shard
            ]
            memory.remember(chosen)
    return found


@pytest.fixture(scope="module")
def on_one_rank() -> list[list[int]]:
    return sizes_on(1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sizes_do_not_depend_on_ranks_or_on_the_order_of_the_pieces(ranks, on_one_rank):
    assert sizes_on(ranks) == on_one_rank


def test_they_are_those_of_a_plain_shard(on_one_rank):
    shard, expected = MemoryShard(MemoryConfig()), []
    for step in range(4):
        for batch in range(2):
            keys, fingerprints_NL = draw(2 * step + batch)
            boxed = np.array([not key.endswith("no_answer") for key in keys])
            sizes_N = np.zeros(RESPONSES, dtype=np.int64)
            for rows, given in ((np.flatnonzero(boxed), LAYERS), (np.flatnonzero(~boxed), 0)):
                chosen = [keys[row] for row in rows]
                sizes_N[rows] = shard.lookup(chosen, fingerprints_NL[rows, :given])
                even = rows[rows % 2 == 0]
                shard.remember([keys[row] for row in even], fingerprints_NL[even, :given])
            expected.append(sizes_N.tolist())
        shard.recluster()
    assert on_one_rank == expected
    assert max(map(max, expected)) > 10 and expected[0] == expected[1] == [0] * RESPONSES


def test_what_is_not_named_is_forgotten():
    memory = StepMemory(MemoryConfig(), 0, 1)
    memory.lookup([0, 1], ["a|wrong|no_answer"] * 2)
    memory.remember([1])
    assert memory.lookup([0], ["a|wrong|no_answer"]).tolist() == [1]
    with pytest.raises(KeyError):
        memory.remember([1])
