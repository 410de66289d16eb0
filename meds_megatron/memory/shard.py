"""One shard of the error memory: the fingerprints of the keys that it owns, clustered key by key."""

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.memory import snapshot
from meds_megatron.memory.clustering import beyond_reach, labels_of_equals, vote, warm_up
from meds_megatron.memory.features import check_settings, features_of, unit_vectors
from meds_megatron.memory.history import KeyHistory, extend, keys_that_fit, longest_history, new_records
from meds_megatron.memory.match import UNKNOWN, Match, shard_of
from meds_megatron.memory.statistics import Moments, StepCounts


class MemoryShard:
    """Fingerprints of past errors by key, clustered; keys are strings, and any shard can hold any key.

    Responses without an answer have no fingerprint. They are remembered under keys of their own, in calls of their own,
    with fingerprints of no layers [N, 0]; all that share a key are one cluster. Windows, half-lives and budgets apply
    to them as well.

    With `method: answer` the place of fingerprints is taken by the codes of final answers (`features.answer_codes`).

    A step is `lookup`, then `remember` and `recluster`. Remembered vectors count from the next `recluster` on, which
    also advances the shard's clock by one step. A key changes in one assignment, so a lookup from another thread sees
    it either before or after, never in between; all other methods are for one caller at a time.
    """

    def __init__(self, config: MemoryConfig, rank: int = 0, shards: int = 1):
        """Shard `rank` of `shards` (see `shard_of`), which matters to snapshots only. Raises UserError for a setting
        out of range."""
        check_settings(config)
        self.config = config
        self.rank = rank
        self.shards = shards
        self.damages: list[str] = []
        """Sentences about the damaged files that `load` left out."""
        self._step = 0
        self._histories: dict[str, KeyHistory] = {}
        self._pending: dict[str, list[np.ndarray]] = defaultdict(list)
        self._moments: Moments | None = None
        self._totals = Counter(keys=0, vectors=0, clusters=0, noise_vectors=0, no_answer=0, bytes=0)
        self._counts = StepCounts()
        warm_up(config)

    def lookup(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> np.ndarray:
        """Size [N] int64 of the cluster that each fingerprint [N, L] falls into: how many stored vectors of its key
        carry the label that wins its vote, 0 for a key never clustered. Fingerprints do not count toward each other."""
        return self.match(keys, fingerprints_NL).sizes_N

    def match(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> Match:
        """Sizes as of `lookup`, and labels: UNKNOWN (-2) for a key never clustered and for what `memory.novelty` calls
        new, -1 for noise."""
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
            new = np.zeros(len(rows), bool)
            if self.config.method == "single" or history.features == 0:
                labels_N[rows] = 0
            elif self.config.method == "answer":
                codes_NF = history.records_N["vector"]
                labels_N[rows] = labels_of_equals(features_NF[rows], codes_NF, stored_N, UNKNOWN)
                new = labels_N[rows] == UNKNOWN
            else:
                queries_QF, points_NF = units_NF[rows], history.units_NF()
                labels_N[rows], nearest_Q = vote(queries_QF, points_NF, stored_N, self.config.knn)
                if self.config.novelty:
                    new = beyond_reach(queries_QF, nearest_Q, points_NF, stored_N, history.ends_M2)
            # Noise is -1, so the counts of labels start there.
            counts = np.rint(np.bincount(stored_N + 1, self._weights(history))).astype(np.int64)
            if self.config.noise == "ignore":
                counts[0] = 0
            sizes_N[rows] = np.where(new, 0, counts[labels_N[rows] + 1])
            labels_N[rows] = np.where(new, UNKNOWN, labels_N[rows])
        self._counts.count_lookups(sizes_N, labels_N)
        self._counts.lookup_seconds += time.perf_counter() - begin
        return Match(labels_N, sizes_N)

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None:
        """Add fingerprints [N, L]; they count from the next `recluster` on."""
        records_N = new_records(self._features_of(keys, fingerprints_NL), self._step)
        for key, rows in _rows_by_key(keys).items():
            if key in self._histories:
                _expect_same(records_N["vector"].shape[1], self._histories[key].features)
            self._pending[key].append(records_N[rows])

    def recluster(self) -> None:
        """Cluster the keys that got vectors since the last call, apply the window and the budget, end the step."""
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
        """Totals of the shard, and counts and times since the last call; `step_metrics` makes metrics of them."""
        counts, self._counts = self._counts, StepCounts()
        # The codes of answers are no coordinates: their covariance means nothing.
        moments = None if self.config.method == "answer" else self._moments
        return {**self._totals, "moments": moments or Moments.empty(0), **dataclasses.asdict(counts)}

    @property
    def bytes_used(self) -> int:
        """Memory that the clustered vectors and their keys take."""
        return self._totals["bytes"]

    def save(self, directory: str | Path) -> dict[str, str]:
        """Write the whole shard as one file into `directory`. Returns the file's name and digest (blake2b of 32 bytes).
        Raises UserError when it cannot be written."""
        clustered = {key: history.records_N for key, history in self._histories.items()}
        pending = {key: np.concatenate(added) for key, added in self._pending.items()}
        config = dataclasses.asdict(self.config)
        saved = snapshot.Snapshot(self.rank, self.shards, self._step, config, self._moments, clustered, pending)
        return {saved.file_name: snapshot.write_snapshot(Path(directory), saved)}

    @classmethod
    def load(
        cls, directory: str | Path, config: MemoryConfig | None = None, rank: int = 0, shards: int = 1
    ) -> "MemoryShard":
        """Shard `rank` of `shards` from a directory that any number of shards was saved in; see `restore`. `config`
        defaults to the saved one."""
        if config is None:
            first = snapshot.snapshot_files(Path(directory), rank, shards)[0]
            config = MemoryConfig(**snapshot.read_snapshot(first).config)
        shard = cls(config, rank, shards)
        shard.damages = shard.restore(directory)
        return shard

    def restore(self, directory: str | Path) -> list[str]:
        """Fill an empty shard with its keys from a directory that any number of shards was saved in.

        From as many shards as were saved, it is bit for bit the shard that was saved. Raises UserError when its vectors
        are made in another way than those of `config` (layers, differences, norm), and DamagedError, which names the
        file, for damage; with `config.skip_damaged`, damaged files are left out and returned, a sentence each.
        """
        damages = []
        for path in snapshot.snapshot_files(Path(directory), self.rank, self.shards):
            try:
                saved = snapshot.read_snapshot(path)
            except snapshot.DamagedError as damage:
                if not self.config.skip_damaged:
                    raise
                damages.append(str(damage))
                continue
            self._check_same_vectors(path, saved.config)
            self._step = max(self._step, saved.step)
            same_shards = saved.shards == self.shards
            for is_pending, table in enumerate((saved.clustered, saved.pending)):
                for key, records_N in table.items():
                    if not same_shards and shard_of(key, self.shards) != self.rank:
                        continue
                    self._expect_features(records_N["vector"].shape[1])
                    if is_pending:
                        self._pending[key].append(records_N)
                    else:
                        self._extend(key, records_N, keep=None)
            if same_shards:
                # Summed key by key, the moments would differ from the saved ones in their last bits.
                self._moments = saved.moments
        self._counts = StepCounts()
        return damages

    def _check_same_vectors(self, path: Path, saved_config: dict) -> None:
        by_answer = "answer" in (saved_config["method"], self.config.method)
        for name in ("method",) if by_answer else ("last_n_layers", "layer_diff", "norm"):
            saved, wanted = saved_config[name], getattr(self.config, name)
            if saved != wanted:
                raise UserError(
                    f"{path} was saved with memory.{name}={saved}, this run has {wanted}: "
                    "set it back, or start without the saved memory."
                )

    def _features_of(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> np.ndarray:
        if len(keys) != len(fingerprints_NL):
            raise UserError(f"{len(keys)} keys came with {len(fingerprints_NL)} fingerprints: give one key a row.")
        if len(keys) == 0:
            return np.empty((0, 1), np.float32)
        features_NF = features_of(fingerprints_NL, self.config)
        self._expect_features(features_NF.shape[1])
        return features_NF

    def _expect_features(self, features: int) -> None:
        if features:
            self._moments = self._moments or Moments.empty(features)
            _expect_same(features, len(self._moments.sum_F))

    def _weights(self, history: KeyHistory) -> np.ndarray | None:
        if self.config.half_life_steps is None:
            return None
        return 0.5 ** ((self._step - history.records_N["step"]) / self.config.half_life_steps)

    def _extend(self, key: str, added_N: np.ndarray, keep: int | None) -> None:
        before = self._histories.get(key)
        known_N = added_N[:0] if before is None else before.records_N
        after, refitted = extend(known_N, added_N, keep, self.config)
        evicted = len(known_N) + len(added_N) - len(after)
        if self._moments and after.features:
            self._moments = self._moments.plus(added_N["vector"])
            if evicted:
                vectors_NF = np.concatenate([known_N["vector"], added_N["vector"]])
                self._moments = self._moments.plus(vectors_NF[:evicted], sign=-1)
        self._replace(key, before, after)
        self._counts.reclustered_keys += 1
        self._counts.fresh_fits += refitted
        self._counts.evicted_vectors += evicted

    def _replace(self, key: str, before: KeyHistory | None, after: KeyHistory | None) -> None:
        if before is not None:
            self._totals.subtract(before.totals())
        if after is None:
            del self._histories[key]
        else:
            self._totals.update(after.totals())
            self._histories[key] = after

    def _keep_to_budget(self) -> None:
        budget = (self.config.budget_gib or np.inf) * 2**30
        if self.bytes_used <= budget:
            return
        record_bytes = max(history.records_N.itemsize for history in self._histories.values())
        by_age = sorted(self._histories, key=lambda key: self._histories[key].records_N["step"][-1])
        for key in by_age[: -max(keys_that_fit(budget, record_bytes), 1)]:
            history = self._histories[key]
            if self._moments and history.features:
                self._moments = self._moments.plus(history.records_N["vector"], sign=-1)
            self._counts.evicted_vectors += len(history)
            self._replace(key, history, None)
        lengths_K = np.array([len(history) for history in self._histories.values()])
        longest = longest_history(lengths_K, budget, record_bytes)
        for key, history in list(self._histories.items()):
            if len(history) > longest:
                self._extend(key, history.records_N[:0], longest)


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
