"""The error memory of a run: a shard on the node of each data-parallel rank, keys spread over the shards by a stable
hash."""

from collections.abc import Iterator, Sequence

import numpy as np
import ray

from meds_megatron.cluster.placement import Place, Placement, rank_places
from meds_megatron.config import Config, MemoryConfig
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.faults.supervised import CONCURRENCY_GROUPS, SupervisedActor, ignore_stop_signals
from meds_megatron.faults.supervision import Supervisor
from meds_megatron.logs import configure_process_logging
from meds_megatron.memory import UNKNOWN, Match, shard_of, step_metrics
from meds_megatron.rollout.samples import Sample

TARGETS = {"wrong": (False,), "right": (True,), "both": (False, True), "none": ()}
"""Values of `correct` that `penalty.target` names."""
NO_ANSWER = "|no_answer"
"""End of the keys of responses without an answer, which have no fingerprint."""


def memory_key(sample: Sample) -> str:
    """Problem and correctness group of a response."""
    return f"{sample.prompt.problem.id}|{'right' if sample.grade.correct else 'wrong'}"


def lookup_key(sample: Sample, config: Config) -> str | None:
    """The key under which a response is looked up and remembered; None where the memory does not concern it.

    A targeted wrong response without an answer has a key of its own with `memory.no_answer: own_cluster`.
    """
    if sample.grade.correct not in TARGETS[config.penalty.target] or sample.grade.failed:
        return None
    if sample.completion.answer_position >= 0:
        return memory_key(sample)
    if config.memory.no_answer == "own_cluster" and not sample.grade.correct:
        return memory_key(sample) + NO_ANSWER
    return None


class ErrorMemory:
    """The shards as one object. `lookup` returns results, `remember` returns at once and is finished before the next
    lookup."""

    def __init__(self, config: Config, placement: Placement, supervisor: Supervisor):
        layout = ParallelLayout.from_config(config)
        places = rank_places(config.cluster)
        nodes = [places[layout.rank(tensor=0, context=0, data=data, pipeline=0)].node for data in range(layout.data)]
        self._shards = [
            ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(_ShardActor)
            .options(**placement.options(Place(node, gpus=()), {"OMP_NUM_THREADS": "1"}))
            .remote(config.memory, number, layout.data, config.run_dir)
            for number, node in enumerate(nodes)
        ]
        for number, shard in enumerate(self._shards):
            supervisor.supervise("memory shard", number, shard_log(number), shard)
        self._supervisor = supervisor
        self._pending: list[ray.ObjectRef] = []
        self._saving: list[ray.ObjectRef] = []

    def lookup(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> Match:
        """Label and size of the cluster that each fingerprint falls into: int64 [N] each, sizes of earlier steps only.

        Rows of keys that end in NO_ANSWER are not read.
        """
        self.wait()
        labels_N = np.full(len(keys), UNKNOWN, dtype=np.int64)
        sizes_N = np.zeros(len(keys), dtype=np.int64)
        parts = list(self._by_shard(keys, fingerprints_NL))
        matches = self._supervisor.results([shard.match.remote(*arguments) for shard, _, *arguments in parts])
        for (_, rows, *_), match in zip(parts, matches, strict=True):
            labels_N[rows], sizes_N[rows] = match.labels_N, match.sizes_N
        return Match(labels_N, sizes_N)

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None:
        """Stores and reclusters. Called once a step, if only for no keys: it moves the clock by which memories age."""
        parts = self._by_shard(keys, fingerprints_NL)
        self._pending += [shard.remember.remote(*arguments) for shard, _, *arguments in parts]
        self._pending += [shard.recluster.remote() for shard in self._shards]

    def wait(self) -> None:
        """Returns when all that was remembered is clustered."""
        self._supervisor.results(self._pending)
        self._pending = []

    def metrics(self) -> dict[str, float]:
        """`memory/...` of the step since the last call."""
        return step_metrics(self._supervisor.results([shard.stats.remote() for shard in self._shards]))

    def begin_save(self, directory: str) -> None:
        """The shards write themselves into a directory, each after the calls made before."""
        self._saving = [shard.save.remote(directory) for shard in self._shards]

    def finish_save(self) -> dict[str, str]:
        """Waits until all shards are written. Returns the digests of their files, by name. Raises UserError when one
        could not be."""
        return {
            name: digest for of_shard in self._supervisor.results(self._saving) for name, digest in of_shard.items()
        }

    def restore(self, directory: str) -> list[str]:
        """Fills the empty shards with those that were saved in a directory, any number of them; returns a sentence for
        each damaged file that was left out. Raises UserError for one that must not be."""
        damages = self._supervisor.results([shard.restore.remote(directory) for shard in self._shards])
        return sorted({sentence for of_shard in damages for sentence in of_shard})

    def close(self) -> None:
        for shard in self._shards:
            ray.kill(shard)

    def _by_shard(
        self, keys: Sequence[str], fingerprints_NL: np.ndarray
    ) -> Iterator[tuple[ray.actor.ActorHandle, list[int], list[str], np.ndarray]]:
        """Shard, rows, keys and fingerprints of each shard's part, keys without an answer ([N, 0]) apart and first."""
        self._supervisor.check()
        owners = [shard_of(key, len(self._shards)) for key in keys]
        for number, shard in enumerate(self._shards):
            mine = [row for row, owner in enumerate(owners) if owner == number]
            for no_answer in (True, False):
                rows = [row for row in mine if keys[row].endswith(NO_ANSWER) == no_answer]
                if rows:
                    yield shard, rows, [keys[row] for row in rows], fingerprints_NL[rows, : 0 if no_answer else None]


def shard_log(number: int) -> str:
    """Name of a shard's log."""
    return f"memory{number:03d}"


class _ShardActor(SupervisedActor):
    """A shard in a process of its own, which alone imports what clustering needs."""

    def __init__(self, config: MemoryConfig, rank: int, shards: int, run_dir: str):
        ignore_stop_signals()
        configure_process_logging(run_dir, shard_log(rank))
        from meds_megatron.memory.shard import MemoryShard

        self._shard = MemoryShard(config, rank, shards)

    def match(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> Match:
        return self._shard.match(keys, fingerprints_NL)

    def remember(self, keys: Sequence[str], fingerprints_NL: np.ndarray) -> None:
        self._shard.remember(keys, fingerprints_NL)

    def recluster(self) -> None:
        self._shard.recluster()

    def stats(self) -> dict:
        return self._shard.stats()

    def save(self, directory: str) -> dict[str, str]:
        return self._shard.save(directory)

    def restore(self, directory: str) -> list[str]:
        return self._shard.restore(directory)
