"""Random streams of fingerprints of one key over a run, rich in ties, duplicates and zeros."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from meds_megatron.config import MemoryConfig

KINDS = ("groups", "one_group", "scattered", "grid", "repeats", "constant", "with_zeros", "parallel")


@dataclass(frozen=True)
class Stream:
    config: MemoryConfig
    batches: list[np.ndarray]
    """Fingerprints [N, L] of each step; a step may bring none."""


def _draw_batch(rng: np.random.Generator, kind: str, size: int, layers: int, centres: np.ndarray, seen: np.ndarray):
    spread = {"one_group": 0.05, "scattered": 3.0}.get(kind, 0.2)
    batch = centres[rng.integers(len(centres), size=size)] + spread * rng.normal(size=(size, layers))
    if kind == "grid":
        batch = np.round(batch)
    if kind == "constant":
        batch = np.repeat(centres[:1], size, axis=0)
    if kind == "with_zeros":
        batch[rng.random(size) < 0.2] = 0.0
    if kind in ("repeats", "parallel") and len(seen):
        again = rng.random(size) < 0.4
        batch[again] = seen[rng.integers(len(seen), size=int(again.sum()))] * (2.0 if kind == "parallel" else 1.0)
    return batch.astype(np.float32)


@st.composite
def streams(draw) -> Stream:
    """A few growing batches of one kind, under settings of which the published ones are the most common."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(KINDS))
    config = MemoryConfig(
        last_n_layers=draw(st.sampled_from([14, 14, 3, 1])),
        layer_diff=draw(st.sampled_from([False, False, True])),
        noise=draw(st.sampled_from(["cluster", "ignore"])),
        allow_single_cluster=draw(st.booleans()),
        min_cluster_size=draw(st.sampled_from([2, 2, 2, 3, 5])),
        min_samples=draw(st.sampled_from([1, 1, 1, 1, 1, 2, 4])),
        knn=draw(st.sampled_from([3, 3, 1, 5])),
        window=draw(st.sampled_from([None, None, None, 15])),
    )
    layers = draw(st.integers(2, 18))
    centres = 3 * rng.normal(size=(1 if kind == "one_group" else int(rng.integers(1, 7)), layers))
    sizes = draw(st.lists(st.integers(0, 24), min_size=1, max_size=5))
    batches, seen = [], np.empty((0, layers), np.float32)
    for size in sizes:
        batches.append(_draw_batch(rng, kind, size, layers, centres, seen))
        seen = np.concatenate([seen, batches[-1]])
    return Stream(config, batches)
