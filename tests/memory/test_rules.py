"""The rules of the method one by one, on cases small enough to see."""

import dataclasses
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import UNKNOWN, Match, MemoryShard, shard_of, step_metrics


def at_degrees(*angles: float) -> np.ndarray:
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def near(centre: list[float], count: int, seed: int = 0) -> np.ndarray:
    return np.array(centre) + 0.01 * np.random.default_rng(seed).normal(size=(count, len(centre)))


def filled(config: MemoryConfig, *batches: np.ndarray) -> MemoryShard:
    shard = MemoryShard(config)
    for batch in batches:
        shard.remember(["problem"] * len(batch), batch)
        shard.recluster()
    return shard


TWO_HABITS = at_degrees(0, 1, 2.5, 88, 90)


def test_size_is_the_number_of_earlier_vectors_of_the_winning_cluster():
    shard = filled(MemoryConfig(), TWO_HABITS)
    assert shard.labels("problem").tolist() == [0, 0, 0, 1, 1]
    queries = np.array([[2.0, 0.01], [0.01, 3.0]])
    assert shard.lookup(["problem", "problem"], queries).tolist() == [3, 2]
    assert shard.lookup(["problem", "problem"], queries).dtype == np.int64


def test_an_unknown_key_has_size_0_and_label_unknown():
    shard = filled(MemoryConfig(), TWO_HABITS)
    match = shard.match(["other"], TWO_HABITS[:1])
    assert (match.sizes_N.tolist(), match.labels_N.tolist()) == ([0], [UNKNOWN])


def test_remembered_vectors_count_only_after_recluster():
    shard = MemoryShard(MemoryConfig())
    shard.remember(["problem"] * 5, TWO_HABITS)
    assert shard.lookup(["problem"], TWO_HABITS[:1]).tolist() == [0]
    shard.recluster()
    assert shard.lookup(["problem"], TWO_HABITS[:1]).tolist() == [3]


def test_noise_counts_as_one_cluster_unless_ignored():
    lonely = at_degrees(10)
    assert filled(MemoryConfig(), lonely).lookup(["problem"], lonely).tolist() == [1]
    scattered = np.concatenate([TWO_HABITS, at_degrees(176, 267)])
    for noise, size in (("cluster", 2), ("ignore", 0)):
        shard = filled(MemoryConfig(noise=noise, knn=1), scattered)
        assert shard.labels("problem")[-2:].tolist() == [-1, -1]
        assert shard.lookup(["problem"], scattered[-1:]).tolist() == [size]


def test_a_tied_vote_goes_to_the_smallest_label():
    assert filled(MemoryConfig(knn=2), TWO_HABITS).lookup(["problem"], at_degrees(45.25)).tolist() == [3]
    swapped = filled(MemoryConfig(knn=2), TWO_HABITS[::-1])
    assert swapped.lookup(["problem"], at_degrees(45.25)).tolist() == [2]


def test_fewer_vectors_than_voters_all_vote():
    shard = filled(MemoryConfig(knn=3, allow_single_cluster=True), at_degrees(0, 1))
    assert shard.labels("problem").tolist() == [0, 0]
    assert shard.lookup(["problem"], at_degrees(80)).tolist() == [2]


def test_zero_vectors_are_equally_far_from_all_so_the_oldest_vote():
    assert filled(MemoryConfig(), TWO_HABITS).lookup(["problem"], np.zeros((1, 2))).tolist() == [3]
    shard = filled(MemoryConfig(), np.zeros((4, 2)))
    assert shard.lookup(["problem"], np.zeros((1, 2))).tolist() == [4]


def test_only_the_last_layers_count_and_differences_come_before_the_cut():
    first_layers = 100 * np.random.default_rng(2).normal(size=(5, 4))
    deep = np.concatenate([first_layers, TWO_HABITS], axis=1)
    assert filled(MemoryConfig(last_n_layers=2), deep).labels("problem").tolist() == [0, 0, 0, 1, 1]
    config = MemoryConfig(last_n_layers=2, layer_diff=True)
    assert filled(config, np.cumsum(deep, axis=1)).labels("problem").tolist() == [0, 0, 0, 1, 1]


def test_one_cluster_is_an_answer_only_if_allowed():
    same = at_degrees(0, 1, 2.5)
    assert filled(MemoryConfig(), same).labels("problem").tolist() == [-1, -1, -1]
    assert filled(MemoryConfig(allow_single_cluster=True), same).labels("problem").tolist() == [0, 0, -1]


def test_equal_vectors_are_one_point_that_nothing_splits():
    alone = at_degrees(*[0] * 6)
    assert filled(MemoryConfig(), alone).labels("problem").tolist() == [-1] * 6
    assert filled(MemoryConfig(allow_single_cluster=True), alone).labels("problem").tolist() == [0] * 6
    two_answers = at_degrees(0, 0, 90, 0, 90)
    shard = filled(MemoryConfig(), two_answers[:3], two_answers[3:])
    labels = shard.labels("problem")
    assert labels[0] == labels[1] == labels[3] != labels[2] == labels[4] and min(labels) == 0
    assert shard.lookup(["problem"] * 2, two_answers[[0, 2]]).tolist() == [3, 2]
    assert shard.stats()["fresh_fits"] == 0


def test_parallel_vectors_are_equal_though_rounding_differs():
    parallel = np.outer([1, 3, 7, 11, 5, 13, 9], [1, 2, 7])
    assert len(np.unique(parallel / np.linalg.norm(parallel, axis=1, keepdims=True), axis=0)) > 1
    assert filled(MemoryConfig(), parallel).labels("problem").tolist() == [-1] * 7
    other = np.outer([1, 3], [7, 1, 2])
    labels = filled(MemoryConfig(), parallel, other).labels("problem").tolist()
    assert len(set(labels[:7])) == len(set(labels[7:])) == 1 and labels[0] != labels[7]


def test_of_equal_lengths_that_of_the_older_vectors_is_merged_first():
    chain = np.eye(5)[:4] + np.eye(5)[1:]  # each at 60 degrees from the next, at 90 from the others
    assert filled(MemoryConfig(), chain).labels("problem").tolist() == [-1] * 4
    from_both_ends = filled(MemoryConfig(), chain[[0, 3, 1, 2]]).labels("problem").tolist()
    assert from_both_ends in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_single_method_counts_the_whole_history():
    shard = filled(MemoryConfig(method="single", noise="ignore"), TWO_HABITS)
    assert shard.lookup(["problem"] * 2, TWO_HABITS[[0, 4]]).tolist() == [5, 5]


def test_old_vectors_fade_with_the_half_life():
    shard = filled(MemoryConfig(method="single", half_life_steps=2), near([1, 0], 8), near([1, 0], 4))
    # Two and one steps old: 8 / 2 + 4 / sqrt(2) = 6.83.
    assert shard.lookup(["problem"], near([1, 0], 1)).tolist() == [7]
    for _ in range(10):
        shard.recluster()
    assert shard.lookup(["problem"], near([1, 0], 1)).tolist() == [0]


def test_a_step_without_fingerprints_is_a_step():
    shard = MemoryShard(MemoryConfig())
    assert shard.lookup([], np.empty((0, 28))).tolist() == []
    shard.remember([], np.empty((0, 28)))
    shard.recluster()
    assert shard.stats()["keys"] == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"method": "dbscan"}, "memory.method is 'dbscan': it must be one of hdbscan, single"),
        ({"noise": "drop"}, "memory.noise is 'drop'"),
        ({"no_answer": "punish"}, "memory.no_answer is 'punish': it must be one of escape, own_cluster"),
        ({"min_cluster_size": 1}, "memory.min_cluster_size is 1: it must be at least 2"),
        ({"window": 0}, "memory.window is 0"),
        ({"min_samples": 0}, "memory.min_samples is 0"),
        ({"knn": 0}, "memory.knn is 0"),
        ({"last_n_layers": -1}, "memory.last_n_layers is -1"),
        ({"norm": "first"}, "memory.norm is 'first': it must be one of last, all, none"),
        ({"half_life_steps": 0.0}, "memory.half_life_steps is 0.0: it must be positive"),
        ({"budget_gib": float("nan")}, "memory.budget_gib is nan: it must be positive"),
    ],
)
def test_a_setting_out_of_range_is_an_error(setting, said):
    with pytest.raises(UserError, match=said):
        MemoryShard(dataclasses.replace(MemoryConfig(), **setting))


def test_bad_fingerprints_are_refused():
    shard = filled(MemoryConfig(), TWO_HABITS)
    bad = TWO_HABITS.copy()
    bad[3, 1] = np.nan
    with pytest.raises(UserError, match="Fingerprint 3 of 5 holds a value that is not finite"):
        shard.remember(["problem"] * 5, bad)
    with pytest.raises(UserError, match="3 layers came to a memory of vectors of 2"):
        shard.lookup(["problem"], np.ones((1, 3)))
    with pytest.raises(UserError, match="2 keys came with 1 fingerprints"):
        shard.lookup(["problem", "other"], np.ones((1, 2)))
    with pytest.raises(UserError, match="leave nothing to compare"):
        MemoryShard(MemoryConfig(layer_diff=True)).remember(["problem"], np.ones((1, 1)))


def test_a_key_has_the_same_shard_in_every_process():
    assert [shard_of(key, 8) for key in ("train/7#wrong", "train/8#wrong", "größer")] == [6, 5, 6]
    counts = np.bincount([shard_of(f"problem {number}", 8) for number in range(4096)])
    assert counts.max() < 1.15 * 512 and counts.min() > 0.85 * 512


def test_a_lookup_never_sees_a_key_half_changed():
    config = MemoryConfig(method="single")
    shard = filled(config, near([1, 0, 0], 3))
    sizes, done = set(), threading.Event()

    def look():
        while not done.is_set():
            sizes.update(shard.lookup(["problem"], near([1, 0, 0], 1)).tolist())

    reader = threading.Thread(target=look)
    reader.start()
    for _ in range(50):
        shard.remember(["problem"] * 7, near([1, 0, 0], 7))
        shard.recluster()
    done.set()
    reader.join()
    assert {(size - 3) % 7 for size in sizes} == {0}


@pytest.mark.usefixtures("processes")
def test_the_package_imports_neither_torch_nor_ray_nor_vllm():
    seen = "import sys, meds_megatron.memory; print(sorted({'torch', 'ray', 'vllm'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_arguments_and_results_can_cross_processes():
    shard = MemoryShard(pickle.loads(pickle.dumps(MemoryConfig())))
    fingerprints = TWO_HABITS.astype(np.float32)
    fingerprints.flags.writeable = False  # as Ray hands arrays to an actor
    keys = ["problem"] * len(fingerprints)
    for _ in range(2):
        shard.remember(keys, fingerprints)
        shard.recluster()
    match = pickle.loads(pickle.dumps(shard.match(keys, fingerprints)))
    assert isinstance(match, Match) and match.sizes_N.dtype == match.labels_N.dtype == np.int64
    assert step_metrics([pickle.loads(pickle.dumps(shard.stats()))])["memory/vectors"] == 10
