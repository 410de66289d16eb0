"""One shard of the error memory: the keys that a data-parallel rank owns."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import storage
from meds_megatron.memory.archive import Archive
from meds_megatron.memory.bounds import keys_that_fit, longest_history
from meds_megatron.memory.clustering import warm_up
from meds_megatron.memory.features import check_settings, features_of, unit_vectors
from meds_megatron.memory.history import KeyHistory, extend, new_records
from meds_megatron.memory.neighbours import vote
from meds_megatron.memory.routing import shard_of
from meds_megatron.memory.segments import DamagedError
from meds_megatron.memory.statistics import Moments, StepCounts

UNKNOWN = -2
"""Label of a fingerprint whose key was never clustered."""


@dataclass(frozen=True)
class Match:
    """What a lookup found: the label that won each fingerprint's vote and the size of that cluster, [N] int64 each."""

    labels_N: np.ndarray
    sizes_N: np.ndarray


class MemoryShard:
    """Fingerprints of past errors by key, clustered; keys are strings, and any shard can hold any key.

    Answers that have no fingerprint can be remembered too, under keys of their own: they come as fingerprints of no
    layers, [N, 0], and all that share a key are one cluster. Windows, half-lives and budgets apply to them as well.

    A step is `lookup`, then `remember` and `recluster`. What is remembered counts from the next `recluster` on, which
    also moves the shard's clock by one step. A key changes in one assignment, so a lookup from another thread sees it
    either before or after, never in between; all other methods want one caller at a time.
    """

    def __init__(self, config: MemoryConfig, rank: int = 0, shards: int = 1):
        """`rank` and `shards` only matter to `save`: this is shard `rank` of `shards` (see `shard_of`)."""
        check_settings(config)
        self.config = config
        self.rank = rank
        self.shards = shards
        self.damages: list[str] = []
        """What `load` had to leave out, a sentence each."""
        self._step = 0
        self._histories: dict[str, KeyHistory] = {}
        self._pending: dict[str, list[np.ndarray]] = defaultdict(list)
        self._moments: Moments | None = None
        self._keys = self._vectors = self._clusters = self._noise = self._unboxed = self._bytes = 0
        self._counts = StepCounts()
        self._archive = Archive()
        warm_up()

    def lookup(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> np.ndarray:
        """Size [N] int64 of the cluster that each fingerprint [N, L] falls into: how many stored vectors of its key
        carry the label that wins its vote, 0 for a key never clustered. Fingerprints do not count toward each other."""
        return self.match(keys, fingerprints_NL).sizes_N

    def match(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> Match:
        """`lookup` that also tells the labels; UNKNOWN (-2) for a key never clustered, -1 for noise."""
        begin = time.perf_counter()
        features_NF = self._features_of(keys, fingerprints_NL)
        units_NF = unit_vectors(features_NF)
        labels_N = np.full(len(keys), UNKNOWN, np.int64)
        sizes_N = np.zeros(len(keys), np.int64)
        for key, rows in _rows_by_key(keys).items():
            history = self._histories.get(key)
            if history is None:
                continue
            _expect_same(features_NF.shape[1], history.features)
            stored_N = history.labels_N
            if self.config.method == "single" or history.features == 0:
                labels_N[rows] = 0
            else:
                labels_N[rows] = vote(units_NF[rows], history.units_NF(), stored_N, self.config.knn)
            # Noise is -1, so the counting of labels starts there.
            counts = np.rint(np.bincount(stored_N + 1, self._weights(history))).astype(np.int64)
            if self.config.noise == "ignore":
                counts[0] = 0
            sizes_N[rows] = counts[labels_N[rows] + 1]
        self._counts.count_lookups(sizes_N, labels_N)
        self._counts.lookup_seconds += time.perf_counter() - begin
        return Match(labels_N, sizes_N)

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None:
        """Take in fingerprints [N, L]; they count from the next `recluster` on."""
        records_N = new_records(self._features_of(keys, fingerprints_NL), self._step)
        for key, rows in _rows_by_key(keys).items():
            if key in self._histories:
                _expect_same(records_N["vector"].shape[1], self._histories[key].features)
            self._pending[key].append(records_N[rows])

    def recluster(self) -> None:
        """Cluster the keys that got vectors since the last call, keep to the bounds, and move on to the next step."""
        begin = time.perf_counter()
        pending, self._pending = self._pending, defaultdict(list)
        for key, added in pending.items():
            self._extend(key, np.concatenate(added), self.config.window)
        self._keep_to_budget()
        self._step += 1
        self._counts.recluster_seconds += time.perf_counter() - begin

    def labels(self, key: str) -> np.ndarray:
        """Labels [n] int64 of a key's clustered vectors, oldest first; -1 is noise. Empty for an unknown key."""
        history = self._histories.get(key)
        return np.empty(0, np.int64) if history is None else history.labels_N

    def stats(self) -> dict:
        """What the shard holds, and what happened since this was last called; `step_metrics` makes metrics of all
        shards' answers."""
        moments = self._moments or Moments(0)
        counts, self._counts = self._counts, StepCounts()
        return {
            "keys": self._keys,
            "vectors": self._vectors,
            "clusters": self._clusters,
            "noise_vectors": self._noise,
            "unboxed": self._unboxed,
            "bytes": self._bytes,
            "moments": (moments.count, moments.sum_F, moments.outer_FF),
            **counts.as_dict(),
        }

    @property
    def bytes_used(self) -> int:
        """Memory that the clustered vectors and their keys take."""
        return self._bytes

    def save(self, directory: str | Path) -> None:
        """Write what is new since the last save or load into `directory`, which then is whole by itself."""
        manifest = storage.Manifest(self.rank, self.shards, self._step, dataclasses.asdict(self.config))
        self._archive.save(Path(directory), self._histories, self._pending, manifest)

    @classmethod
    def load(
        cls, directory: str | Path, config: MemoryConfig | None = None, rank: int = 0, shards: int = 1
    ) -> "MemoryShard":
        """Shard `rank` of `shards` from a directory that any number of shards was saved in.

        `config` defaults to the saved one; what vectors are made of (layers, differences) must agree with it. Damage
        raises DamagedError (a UserError) naming the file; with `config.skip_damaged` it is left out and told in
        `damages`.
        """
        directory = Path(directory)
        skip_damaged = config is not None and config.skip_damaged
        manifests, damages = storage.read_manifests(directory, rank, shards, skip_damaged)
        shard = cls(config or MemoryConfig(**manifests[0].config), rank, shards)
        shard.damages = damages
        for manifest in manifests:
            shard._check_same_vectors(directory, manifest)
            shard._step = max(shard._step, manifest.step)
        shard._restore(directory, manifests, skip_damaged)
        shard._counts = StepCounts()
        if len(manifests) == 1 and manifests[0].shards == shards and not shard.damages:
            shard._archive.resume_from(directory, manifests[0])
        return shard

    def _features_of(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> np.ndarray:
        if len(keys) != len(fingerprints_NL):
            raise UserError(f"{len(keys)} keys came with {len(fingerprints_NL)} fingerprints: give one key a row.")
        if len(keys) == 0:
            return np.empty((0, self._moments.features if self._moments else 1), np.float32)
        features_NF = features_of(fingerprints_NL, self.config)
        self._expect_features(features_NF.shape[1])
        return features_NF

    def _expect_features(self, features: int) -> None:
        if features == 0:
            return
        if self._moments is None:
            self._moments = Moments(features)
        _expect_same(features, self._moments.features)

    def _weights(self, history: KeyHistory) -> np.ndarray | None:
        if self.config.half_life_steps is None:
            return None
        return 0.5 ** ((self._step - history.records_N["step"]) / self.config.half_life_steps)

    def _extend(self, key: str, added_N: np.ndarray, keep: int | None) -> None:
        before = self._histories.get(key)
        after, fresh_fit = extend(before, added_N, keep, self.config)
        evicted = after.dropped - (0 if before is None else before.dropped)
        if after.features:
            self._moments.add(added_N["vector"])
            if evicted:
                known_N = added_N if before is None else np.concatenate([before.records_N, added_N])
                self._moments.remove(known_N["vector"][:evicted])
        self._archive.note(key, 0 if before is None else before.dropped + len(before))
        self._replace(key, before, after)
        self._counts.reclustered_keys += 1
        self._counts.fresh_fits += fresh_fit
        self._counts.evicted_vectors += evicted

    def _replace(self, key: str, before: KeyHistory | None, after: KeyHistory | None) -> None:
        for history, sign in ((before, -1), (after, 1)):
            if history is None:
                continue
            self._bytes += sign * history.bytes
            if history.features == 0:
                self._unboxed += sign * len(history)
                continue
            self._keys += sign
            self._vectors += sign * len(history)
            self._clusters += sign * history.clusters
            self._noise += sign * history.noise
        if after is None:
            del self._histories[key]
        else:
            self._histories[key] = after

    def _keep_to_budget(self) -> None:
        budget = (self.config.budget_gib or np.inf) * 2**30
        if self._bytes <= budget:
            return
        record_bytes = max(history.records_N.itemsize for history in self._histories.values())
        by_age = sorted(self._histories, key=lambda key: self._histories[key].records_N["step"][-1])
        for key in by_age[: -max(keys_that_fit(budget, record_bytes), 1)]:
            history = self._histories[key]
            if history.features:
                self._moments.remove(history.records_N["vector"])
            self._counts.evicted_vectors += len(history)
            self._replace(key, history, None)
            # A key that comes back numbers its vectors from 0 again, so no older segment may speak of it.
            self._archive.start_anew()
        lengths_K = np.array([len(history) for history in self._histories.values()])
        longest = longest_history(lengths_K, budget, record_bytes)
        for key, history in list(self._histories.items()):
            if len(history) > longest:
                self._extend(key, history.records_N[:0], longest)

    def _check_same_vectors(self, directory: Path, manifest: storage.Manifest) -> None:
        for name in ("last_n_layers", "layer_diff", "norm"):
            saved, wanted = manifest.config[name], getattr(self.config, name)
            if saved != wanted:
                raise UserError(
                    f"The memory in {directory} was saved with memory.{name}={saved}, this run has {wanted}: "
                    "set it back, or start without the saved memory."
                )

    def _restore(self, directory: Path, manifests: list[storage.Manifest], skip_damaged: bool) -> None:
        parts: dict[str, list[storage.Part]] = defaultdict(list)
        for manifest in manifests:
            for segment in filter(None, [*manifest.segments, manifest.pending]):
                try:
                    for part in storage.read_parts(directory, segment):
                        if manifest.shards != self.shards and shard_of(part.key, self.shards) != self.rank:
                            continue
                        self._expect_features(part.vectors_NF.shape[1])
                        if segment is manifest.pending:
                            self._pending[part.key].append(new_records(part.vectors_NF, part.steps_N))
                        else:
                            parts[part.key].append(part)
                except DamagedError as damage:
                    if not skip_damaged:
                        raise
                    self.damages.append(str(damage))
        for key, parts_of_key in parts.items():
            dropped, records_N = storage.join_parts(parts_of_key)
            if len(records_N):
                self._replace(key, None, KeyHistory(records_N[:0], dropped, 0, 0))
                self._extend(key, records_N, keep=None)


def _expect_same(features: int, known: int) -> None:
    if features != known:
        raise UserError(
            f"A vector of {features} layers came to a memory of vectors of {known}: "
            "use the model that the memory was made with, or start without it."
        )


def _rows_by_key(keys: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        rows[key].append(row)
    return rows
