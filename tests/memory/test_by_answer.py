"""Memory by final answer: sizes are counts of equal answers, through windows, shards and snapshots."""

from collections import Counter

import numpy as np
import pytest

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import UNKNOWN, MemoryShard, shard_of, step_metrics
from meds_megatron.memory.features import answer_codes

BY_ANSWER = MemoryConfig(method="answer")


def filled(config: MemoryConfig, *batches: list[str]) -> MemoryShard:
    shard = MemoryShard(config)
    for batch in batches:
        shard.remember(["problem"] * len(batch), answer_codes(batch))
        shard.recluster()
    return shard


def sizes(shard: MemoryShard, *answers: str, key: str = "problem") -> list[int]:
    return shard.lookup([key] * len(answers), answer_codes(answers)).tolist()


def test_size_is_the_number_of_earlier_equal_answers():
    shard = filled(BY_ANSWER, ["7", "8", "7"], ["9", "7"])
    assert shard.labels("problem").tolist() == [0, 1, 0, 2, 0]
    match = shard.match(["problem"] * 4, answer_codes(["7", "8", "9", "10"]))
    assert (match.sizes_N.tolist(), match.labels_N.tolist()) == ([3, 1, 1, 0], [0, 1, 2, UNKNOWN])
    assert sizes(shard, "7", key="other") == [0]


def test_codes_are_whole_numbers_that_differ_and_are_the_same_everywhere():
    answers = [str(number) for number in range(20000)] + ["", "\\frac{1}{2}", "\ud800"]
    codes_NC = answer_codes(answers)
    assert len(np.unique(codes_NC, axis=0)) == len(answers)
    assert (codes_NC == codes_NC.astype(np.int64)).all() and codes_NC.max() < 2**20
    # BLAKE2b of "7" with 8 bytes, as `b2sum -l 64` prints it, in parts of 20 bits from the last on.
    assert answer_codes(["7"]).tolist() == [[561026.0, 830695.0, 479255.0]]


@pytest.mark.parametrize(
    "config",
    [
        BY_ANSWER,
        MemoryConfig(method="answer", window=10),
        MemoryConfig(method="answer", half_life_steps=2.0),
        MemoryConfig(method="answer", novelty=True, noise="ignore", layer_diff=True, last_n_layers=1),
    ],
)
def test_streams_equal_plain_counts(config):
    rng = np.random.default_rng(3)
    shard, stored = MemoryShard(config), {"a": [], "b": []}
    for step in range(12):
        for key, history in stored.items():
            weights = Counter()
            for answer, when in history:
                weights[answer] += 0.5 ** ((step - when) / config.half_life_steps) if config.half_life_steps else 1
            expected = [round(weights[str(number)]) for number in range(6)]
            assert sizes(shard, *map(str, range(6)), key=key) == expected
        for key, history in stored.items():
            answers = [str(number) for number in rng.integers(0, 6, rng.integers(1, 5))]
            shard.remember([key] * len(answers), answer_codes(answers))
            history += [(answer, step) for answer in answers]
            del history[: -config.window if config.window else 0]
        shard.recluster()


def test_responses_without_an_answer_are_one_cluster_beside_it():
    shard = filled(BY_ANSWER, ["7"])
    shard.remember(["problem|no_answer"] * 3, np.zeros((3, 0), np.float32))
    shard.recluster()
    assert shard.lookup(["problem|no_answer"], np.zeros((1, 0), np.float32)).tolist() == [3]
    assert sizes(shard, "7") == [1]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_resumed_memory_goes_on_exactly_on_any_number_of_shards(after, tmp_path):
    rng = np.random.default_rng(5)
    keys = [f"problem {number}" for number in range(20)]
    whole, before = MemoryShard(BY_ANSWER), [MemoryShard(BY_ANSWER, rank, 2) for rank in range(2)]
    steps = [[str(number) for number in rng.integers(0, 4, len(keys))] for _ in range(6)]

    def remember(shards: list[MemoryShard], answers: list[str]) -> None:
        for shard in shards:
            mine = [row for row, key in enumerate(keys) if shard_of(key, len(shards)) == shard.rank]
            shard.remember([keys[row] for row in mine], answer_codes([answers[row] for row in mine]))
            shard.recluster()

    for answers in steps[:3]:
        remember([whole], answers)
        remember(before, answers)
    for shard in before:
        shard.save(tmp_path)
    resumed = [MemoryShard.load(tmp_path, rank=rank, shards=after) for rank in range(after)]
    for answers in steps[3:]:
        remember([whole], answers)
        remember(resumed, answers)
    for key in keys:
        owner = resumed[shard_of(key, after)]
        assert owner.labels(key).tolist() == whole.labels(key).tolist()
        assert sizes(owner, "0", "1", "2", "3", key=key) == sizes(whole, "0", "1", "2", "3", key=key)


def test_a_memory_of_fingerprints_is_not_taken_for_one_of_answers(tmp_path):
    filled(BY_ANSWER, ["7"]).save(tmp_path)
    with pytest.raises(UserError, match=r"saved with memory\.method=answer, this run has hdbscan"):
        MemoryShard.load(tmp_path, MemoryConfig())
    other = MemoryShard(MemoryConfig(method="single"))
    other.remember(["problem"], np.ones((1, 3)))
    other.recluster()
    other.save(tmp_path)
    with pytest.raises(UserError, match=r"saved with memory\.method=single, this run has answer"):
        MemoryShard.load(tmp_path, BY_ANSWER)


def test_statistics_count_answers_and_claim_no_eigenvalues():
    shard = filled(BY_ANSWER, ["7", "8", "7"])
    sizes(shard, "7", "9")
    metrics = step_metrics([shard.stats()])
    assert (metrics["memory/clusters"], metrics["memory/vectors"], metrics["memory/noise_share"]) == (2, 3, 0)
    assert (metrics["memory/hit_share"], metrics["memory/top_eigenvalue_share"]) == (0.5, 0)
