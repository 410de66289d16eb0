"""Cost of the error memory: against a straightforward version, over shards, and at a million prompts.

Times are processor seconds of one thread, so that other work on the machine does not count.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from meds_megatron.config import MemoryConfig
from meds_megatron.memory.history import new_records
from meds_megatron.memory.match import shard_of
from meds_megatron.memory.shard import MemoryShard
from meds_megatron.memory.snapshot import Snapshot, read_snapshot, write_snapshot

LAYERS = 28
MISTAKES = 6
"""Distinct mistakes of a problem in the synthetic data."""
MILLION = 1_000_000
VECTORS_PER_PROMPT = 64
SAVE_SHARDS = 8
SAVE_RESPONSES = 16
"""Responses to each prompt, all remembered."""
SAVE_KEYS = 2000
"""Problems of a shard: those of a data set of 16000."""


def run(
    histories: Sequence[int] = (16, 64, 256, 800, 1600),
    repeats: Sequence[float] = (0.0, 0.5),
    keys: int = 512,
    new: int = 12,
    straightforward_keys: int = 64,
    shard_counts: Sequence[int] = (1, 2, 4, 8),
    shard_keys: int = 4096,
    sample_keys: int = 8192,
    save_steps: Sequence[int] = (100, 1000),
    seed: int = 0,
) -> dict:
    """Measure a step of `keys` prompts with `new` vectors each.

    Returns `rows`, one for each share of repeated vectors and each history: {repeats, history, ours_s,
    straightforward_s, speedup, lookup_s, same_partition}; the straightforward version runs on `straightforward_keys` of
    the keys and its time is scaled to all of them, and `same_partition` is the share of these keys in which both found
    the same clusters. `shards`, one a number of shards:
    {shards, keys_mean, keys_max, imbalance, slowest_s, total_s} for `shard_keys` random keys. `million`: the cost of
    `sample_keys` prompts of 64 vectors, scaled to a million: {prompts, vectors_per_prompt, raw_bytes_per_vector,
    bytes_per_vector, ratio, resident_bytes_per_vector, step_s, gib_per_shard}. `save`, one a number of steps: the file
    of one shard of SAVE_SHARDS, {steps, mib, write_s, read_s}, when every response of SAVE_RESPONSES is remembered.
    """
    with threadpool_limits(1):
        # First, while the process holds nothing else.
        million = _million(sample_keys, keys, new, shard_counts, seed)
        return {
            "keys": keys,
            "new": new,
            "straightforward_keys": min(straightforward_keys, keys),
            "rows": [
                _compare(repeated, history, keys, new, min(straightforward_keys, keys), seed)
                for repeated in repeats
                for history in histories
            ],
            "shards": [_spread(shards, shard_keys, new, seed) for shards in shard_counts],
            "million": million,
            "save": [_save(steps, keys, seed) for steps in save_steps],
        }


class Problems:
    """Synthetic fingerprints: every key has a few mistakes of its own, and the share `repeats` of the responses are
    token for token the same answer of their mistake."""

    def __init__(self, names: Sequence[str], seed: int, repeats: float = 0.0):
        self.names = list(names)
        self.repeats = repeats
        self._rng = np.random.default_rng(seed)
        self._mistakes = 15 + 3 * self._rng.normal(size=(len(self.names), MISTAKES, LAYERS))

    def draw(self, count: int) -> tuple[list[str], np.ndarray]:
        """`count` fingerprints of each key: the keys and the array [keys * count, layers]."""
        keys = len(self.names)
        mistakes = self._rng.integers(MISTAKES, size=(keys, count))
        noise = self._rng.normal(size=(keys, count, LAYERS))
        if self.repeats:
            noise[self._rng.random((keys, count)) < self.repeats] = 0.0
        drawn = self._mistakes[np.arange(keys)[:, None], mistakes] + noise
        return [name for name in self.names for _ in range(count)], drawn.reshape(-1, LAYERS).astype(np.float32)


class Straightforward:
    """The simplest form of the method: a fit from scratch for every key, a neighbour search for every sample."""

    def __init__(self, config: MemoryConfig):
        self.config = config
        self.vectors: dict[str, np.ndarray] = {}
        self.labels: dict[str, np.ndarray] = {}

    def lookup(self, keys: list[str], fingerprints_NL: np.ndarray) -> list[int]:
        return [self._size(key, fingerprint) for key, fingerprint in zip(keys, fingerprints_NL, strict=True)]

    def _size(self, key: str, fingerprint_L: np.ndarray) -> int:
        search = NearestNeighbors(n_neighbors=self.config.knn, metric="cosine").fit(self.vectors[key])
        nearest = search.kneighbors(fingerprint_L[None, -self.config.last_n_layers :], return_distance=False)[0]
        votes = Counter(self.labels[key][nearest].tolist())
        winner = min(votes, key=lambda label: (-votes[label], label))
        return int(np.count_nonzero(self.labels[key] == winner))

    def remember(self, keys: list[str], fingerprints_NL: np.ndarray) -> None:
        for key in dict.fromkeys(keys):
            rows = [row for row, other in enumerate(keys) if other == key]
            added = fingerprints_NL[rows, -self.config.last_n_layers :]
            self.vectors[key] = np.concatenate([self.vectors[key], added]) if key in self.vectors else added
            self._fit(key)

    def _fit(self, key: str) -> None:
        vectors = self.vectors[key].astype(np.float64)
        import hdbscan

        model = hdbscan.HDBSCAN(min_cluster_size=self.config.min_cluster_size, min_samples=self.config.min_samples)
        self.labels[key] = model.fit(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).labels_


def _seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _compare(repeats: float, history: int, keys: int, new: int, straightforward_keys: int, seed: int) -> dict:
    config = MemoryConfig()
    shard, plain = MemoryShard(config), Straightforward(config)
    problems = Problems([f"problem {number}" for number in range(keys)], seed, repeats)
    few = problems.names[:straightforward_keys]
    names, fingerprints = problems.draw(history)
    shard.remember(names, fingerprints)
    shard.recluster()
    for place, name in enumerate(few):
        rows = slice(place * history, (place + 1) * history)
        plain.vectors[name] = fingerprints[rows, -config.last_n_layers :]
        plain.labels[name] = shard.labels(name)

    names, fingerprints = problems.draw(new)
    lookup = _seconds(lambda: shard.lookup(names, fingerprints))
    remembering = _seconds(partial(shard.remember, names, fingerprints)) + _seconds(shard.recluster)
    few_rows = straightforward_keys * new
    names, fingerprints = names[:few_rows], fingerprints[:few_rows]
    straightforward = _seconds(partial(plain.lookup, names, fingerprints))
    straightforward += _seconds(partial(plain.remember, names, fingerprints))
    straightforward *= keys / straightforward_keys
    same = sum(_same_partition(shard.labels(name), plain.labels[name]) for name in few)
    return {
        "repeats": repeats,
        "history": history,
        "ours_s": lookup + remembering,
        "straightforward_s": straightforward,
        "speedup": straightforward / (lookup + remembering),
        "lookup_s": lookup,
        "same_partition": same / straightforward_keys,
    }


def _same_partition(one_N: np.ndarray, other_N: np.ndarray) -> bool:
    pairs = set(zip(one_N.tolist(), other_N.tolist(), strict=True))
    noise_agrees = all((one == -1) == (other == -1) for one, other in pairs)
    return noise_agrees and len(pairs) == len(set(one_N.tolist())) == len(set(other_N.tolist()))


def _spread(shards: int, keys: int, new: int, seed: int) -> dict:
    names = [f"{number:016x}" for number in np.random.default_rng(seed).integers(2**63, size=keys)]
    owners = [shard_of(name, shards) for name in names]
    seconds = []
    for owner in range(shards):
        problems = Problems([name for name, place in zip(names, owners, strict=True) if place == owner], seed)
        shard = MemoryShard(MemoryConfig())
        shard.remember(*problems.draw(16))
        shard.recluster()
        drawn = problems.draw(new)
        seconds.append(_seconds(partial(_step, shard, drawn)))
    counts = np.bincount(owners, minlength=shards)
    return {
        "shards": shards,
        "keys_mean": keys / shards,
        "keys_max": int(counts.max()),
        "imbalance": float(np.abs(counts / (keys / shards) - 1).max()),
        "slowest_s": max(seconds),
        "total_s": sum(seconds),
    }


def _step(shard: MemoryShard, drawn: tuple[list[str], np.ndarray]) -> None:
    shard.lookup(*drawn)
    shard.remember(*drawn)
    shard.recluster()


def _million(sample_keys: int, step_keys: int, new: int, shard_counts: Sequence[int], seed: int) -> dict:
    shard = MemoryShard(MemoryConfig())
    resident = []
    for group in range(max(sample_keys // 128, 2)):
        # Few keys at a time, so that temporary arrays are small compared with the stored ones.
        names = [f"train/{group}/{number}#wrong" for number in range(min(sample_keys // 2, 128))]
        shard.remember(*Problems(names, seed + group).draw(VECTORS_PER_PROMPT))
        shard.recluster()
        resident.append((shard.stats()["vectors"], _resident_bytes()))
    # The first half also holds what a process allocates once.
    (first_vectors, first_bytes), (vectors, last_bytes) = resident[(len(resident) - 1) // 2], resident[-1]
    bytes_per_vector = shard.bytes_used / vectors
    drawn = Problems(names[:step_keys], seed).draw(new)
    step = _seconds(lambda: _step(shard, drawn))
    raw = 4 * shard.config.last_n_layers
    return {
        "prompts": MILLION,
        "vectors_per_prompt": VECTORS_PER_PROMPT,
        "sample_prompts": sample_keys,
        "raw_bytes_per_vector": raw,
        "bytes_per_vector": bytes_per_vector,
        "ratio": bytes_per_vector / raw,
        "resident_bytes_per_vector": (last_bytes - first_bytes) / (vectors - first_vectors),
        "step_s": step * step_keys / min(step_keys, len(names)),
        "gib_per_shard": {
            str(shards): bytes_per_vector * MILLION * VECTORS_PER_PROMPT / shards / 2**30 for shards in shard_counts
        },
    }


def _save(steps: int, keys: int, seed: int) -> dict:
    vectors = steps * keys * SAVE_RESPONSES // SAVE_SHARDS
    each = max(1, vectors // SAVE_KEYS)
    random, steps_N = np.random.default_rng(seed), np.arange(each, dtype=np.int32)
    records = {
        f"problem-{number}|wrong": new_records(random.normal(size=(each, LAYERS)).astype(np.float32), steps_N)
        for number in range(vectors // each)
    }
    saved = Snapshot(0, SAVE_SHARDS, steps, {}, None, records, {})
    with tempfile.TemporaryDirectory(prefix="meds-bench-") as directory:
        path = Path(directory) / saved.file_name
        begin = time.perf_counter()
        write_snapshot(path.parent, saved)
        written = time.perf_counter()
        read_snapshot(path)
        times = {"write_s": written - begin, "read_s": time.perf_counter() - written}
        return {"steps": steps, "mib": path.stat().st_size / 2**20, **times}


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where /proc is not there."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
