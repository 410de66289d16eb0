"""The error memory over shard actors: the same on every number of shards, and as one plain shard."""

from types import SimpleNamespace

import numpy as np
import pytest

from meds_megatron.config import Config, MemoryConfig
from meds_megatron.faults.supervision import Supervisor
from meds_megatron.memory import MemoryShard
from meds_megatron.trainer.error_memory import NO_ANSWER, ErrorMemory

LAYERS = 16
RESPONSES = 120
STEPS = 4


def draw(step: int) -> tuple[list[str], np.ndarray]:
    """Keys and fingerprints [N, L] of a step; those of keys without an answer are NaN."""
    rng = np.random.default_rng(step)
    habits = np.random.default_rng(0).normal(size=(4, LAYERS))
    keys = [f"{number}|wrong{NO_ANSWER if rng.random() < 0.2 else ''}" for number in rng.integers(7, size=RESPONSES)]
    fingerprints_NL = habits[rng.integers(4, size=RESPONSES)] + 0.1 * rng.normal(size=(RESPONSES, LAYERS))
    fingerprints_NL[[key.endswith(NO_ANSWER) for key in keys]] = np.nan
    return keys, fingerprints_NL.astype(np.float32)


def remembered(keys: list[str], fingerprints_NL: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Half of the responses."""
    return keys[::2], fingerprints_NL[::2]


@pytest.fixture(scope="module")
def plain_shard() -> list[tuple[list[int], list[int]]]:
    """Labels and sizes of every lookup, from one MemoryShard without actors."""
    shard, found = MemoryShard(MemoryConfig()), []
    for step in range(STEPS):
        drawn = [draw(2 * step), draw(2 * step + 1)]
        for keys, fingerprints_NL in drawn:
            labels_N, sizes_N = np.zeros(RESPONSES, np.int64), np.zeros(RESPONSES, np.int64)
            for rows, chosen_keys, chosen_NL in by_answer(keys, fingerprints_NL):
                match = shard.match(chosen_keys, chosen_NL)
                labels_N[rows], sizes_N[rows] = match.labels_N, match.sizes_N
            found.append((labels_N.tolist(), sizes_N.tolist()))
        for keys, fingerprints_NL in drawn:
            for _, chosen_keys, chosen_NL in by_answer(*remembered(keys, fingerprints_NL)):
                shard.remember(chosen_keys, chosen_NL)
        shard.recluster()
    assert max(max(sizes) for _, sizes in found) > 10
    assert found[0][1] == found[1][1] == [0] * RESPONSES, "responses of one step do not count toward each other"
    return found


def by_answer(keys: list[str], fingerprints_NL: np.ndarray):
    no_answer_N = np.array([key.endswith(NO_ANSWER) for key in keys])
    for rows, layers in ((np.flatnonzero(no_answer_N), 0), (np.flatnonzero(~no_answer_N), LAYERS)):
        yield rows, [keys[row] for row in rows], fingerprints_NL[rows, :layers]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_lookups_do_not_depend_on_the_number_of_shards(shared_ray, shards, plain_shard):
    config = Config()
    config.cluster.ranks_per_node = shards
    placement = SimpleNamespace(options=lambda place, env_vars: {"num_cpus": 0})
    memory = ErrorMemory(config, placement, Supervisor(""))
    found = []
    for step in range(STEPS):
        drawn = [draw(2 * step), draw(2 * step + 1)]
        for keys, fingerprints_NL in drawn:
            match = memory.lookup(keys, fingerprints_NL)
            found.append((match.labels_N.tolist(), match.sizes_N.tolist()))
        memory.remember(
            [key for keys, values in drawn for key in remembered(keys, values)[0]],
            np.concatenate([remembered(keys, values)[1] for keys, values in drawn]),
        )
    memory.wait()
    metrics = memory.metrics()
    assert found == plain_shard
    assert metrics["memory/vectors"] + metrics["memory/no_answer"] == STEPS * RESPONSES
    memory.close()
