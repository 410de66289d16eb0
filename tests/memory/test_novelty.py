"""`memory.novelty`: a mistake farther from its nearest stored vector than that cluster reaches is new."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import UNKNOWN, Match, MemoryShard
from tests.examples import examples
from tests.memory.reference import features, units
from tests.memory.streams import Stream, streams

NOVELTY = MemoryConfig(novelty=True)
thorough = examples(200)


def filled(config: MemoryConfig, *batches: np.ndarray) -> MemoryShard:
    shard = MemoryShard(config)
    for batch in batches:
        shard.remember(["problem"] * len(batch), batch)
        shard.recluster()
    return shard


def match(shard: MemoryShard, vectors_NF: np.ndarray) -> Match:
    return shard.match(["problem"] * len(vectors_NF), vectors_NF)


def reaches_of(model) -> dict[int, float]:
    """1 / lambda of the birth of each selected cluster: that of the condensed tree with exactly its members."""
    tree, points = model.condensed_tree_.to_numpy(), len(model.labels_)
    members, reaches = {}, {}
    for row in tree[::-1]:  # children come after their parents
        below = members.get(row["child"], {row["child"]}) if row["child"] >= points else {row["child"]}
        members[row["parent"]] = members.get(row["parent"], set()) | below
    for row in tree[tree["child"] >= points]:
        labels = set(model.labels_[list(members[row["child"]])])
        label = labels.pop()
        if not labels and label >= 0 and len(members[row["child"]]) == np.count_nonzero(model.labels_ == label):
            reaches[label] = 1 / row["lambda_val"]
    return reaches


def test_vectors_far_from_both_of_two_clusters_are_new():
    rng = np.random.default_rng(0)
    centres = np.eye(14)[[0, 0]] + 0.5 * np.eye(14)[:2]
    two = np.repeat(centres, 10, axis=0) + 0.01 * rng.normal(size=(20, 14))
    far = -np.eye(14)[:5] + 0.01 * rng.normal(size=(5, 14))
    near = centres[[0, 1, 1]] + 0.01 * rng.normal(size=(3, 14))
    assert match(filled(MemoryConfig(), two), far).sizes_N.tolist() == [10] * 5
    found = match(filled(NOVELTY, two), far)
    assert (found.sizes_N.tolist(), found.labels_N.tolist()) == ([0] * 5, [UNKNOWN] * 5)
    assert match(filled(NOVELTY, two), near).sizes_N.tolist() == [10] * 3


@thorough
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3))
def test_a_cluster_reaches_as_far_as_the_package_says_it_was_born(seed, spread):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(5, 14)) + 5
    drawn = (centres[rng.integers(5, size=90)] + spread * rng.normal(size=(90, 14))).astype(np.float32)
    stored, queries = drawn[:60], np.concatenate([drawn[60:], stored_copies := drawn[:10]])
    import hdbscan

    model = hdbscan.HDBSCAN(min_cluster_size=2, min_samples=1, approx_min_span_tree=False, core_dist_n_jobs=1)
    model.fit(units(stored))
    assume(model.labels_.max() >= 0)
    reaches = reaches_of(model)
    distances = np.linalg.norm(units(queries)[:, None] - units(stored)[None], axis=-1)
    nearest = model.labels_[distances.argmin(axis=1)]
    beyond = [
        label >= 0 and least > reaches[label] for label, least in zip(nearest, distances.min(axis=1), strict=True)
    ]
    assert not any(beyond[-len(stored_copies) :])
    off = match(filled(MemoryConfig(), stored), queries)
    on = match(filled(NOVELTY, stored[:25], stored[25:]), queries)
    assert on.sizes_N.tolist() == np.where(beyond, 0, off.sizes_N).tolist()
    assert on.labels_N.tolist() == np.where(beyond, UNKNOWN, off.labels_N).tolist()


@thorough
@given(streams())
def test_on_any_stream_sizes_are_the_published_ones_or_0_and_repeats_are_never_new(stream: Stream):
    config = dataclasses.replace(stream.config, min_samples=1, window=None)
    off, on = MemoryShard(config), MemoryShard(dataclasses.replace(config, novelty=True))
    seen = np.empty((0, stream.batches[0].shape[1]), np.float32)
    for batch in stream.batches:
        published, found = match(off, batch), match(on, batch)
        new = found.labels_N == UNKNOWN
        known = np.flatnonzero(~new)
        assert (found.sizes_N[known] == published.sizes_N[known]).all() and not found.sizes_N[new].any()
        for shard in (off, on):
            shard.remember(["problem"] * len(batch), batch)
            shard.recluster()
        seen = np.concatenate([seen, batch])
        vectors = features(seen, config)
        nonzero = np.abs(vectors).sum(axis=1) > 0  # a zero vector is equally near to all others
        if len(seen):
            assert (match(on, seen).labels_N[nonzero] != UNKNOWN).all()


def test_with_one_cluster_of_all_vectors_nothing_is_new():
    for config in (
        dataclasses.replace(NOVELTY, allow_single_cluster=True),
        MemoryConfig(method="single", novelty=True),
    ):
        same = filled(config, np.ones((6, 14)))
        assert match(same, -np.ones((1, 14))).sizes_N.tolist() == [6]


def test_noise_and_a_lone_vector_have_no_reach():
    assert match(filled(NOVELTY, np.eye(14)[:1]), np.eye(14)[1:2]).sizes_N.tolist() == [1]
    assert match(filled(NOVELTY, np.eye(14)[:3]), np.eye(14)[5:6]).sizes_N.tolist() == [3]


def test_it_needs_the_spanning_tree_of_plain_distances():
    with pytest.raises(UserError, match=r"memory\.novelty=true comes with memory\.min_samples=2: it needs 1"):
        MemoryShard(MemoryConfig(novelty=True, min_samples=2))


def test_a_restored_shard_calls_the_same_vectors_new(tmp_path):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.normal(size=(30, 14)) + 2 for _ in range(2))
    shard = filled(NOVELTY, vectors[:11], vectors[11:])
    shard.save(tmp_path)
    before, after = match(shard, queries), match(MemoryShard.load(tmp_path), queries)
    assert before.labels_N.tolist() == after.labels_N.tolist() and UNKNOWN in before.labels_N
