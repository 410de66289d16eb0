"""The trainer ranks as one object: every call reaches all of them."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import ray

from meds_megatron.actor.schedule import Schedule, schedule
from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch, UpdateOutput, scatter_ragged
from meds_megatron.actor.worker import PolicyWorker, rank_env_vars, rank_log
from meds_megatron.cluster.placement import Placement, rank_places
from meds_megatron.config import Config, ModelShape
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.faults.supervised import CONCURRENCY_GROUPS
from meds_megatron.faults.supervision import PendingResult, Supervisor
from meds_megatron.weights.resharding.types import SyncSpec

T = TypeVar("T")

CLOSE_SECONDS = 5
LOCAL_LAYERS = (
    "layers are megatron-core's local ones, since Transformer Engine is not installed: norms, rotary embeddings and "
    "SwiGLU are not fused, and forward and update take some 5 to 10 % longer (estimated); bash tools/setup.sh cuda "
    "compiles it where nvcc is"
)

logger = logging.getLogger(__name__)


class PolicyGroup:
    """A Ray actor for each trainer rank; the constructor starts them, `start` waits until the model is loaded."""

    def __init__(self, config: Config, model_dir: str, placement: Placement, supervisor: Supervisor):
        self.layout = ParallelLayout.from_config(config)
        self._config, self._model_dir, self._supervisor = config, model_dir, supervisor
        self._shape = ModelShape.from_hf(model_dir)
        worker, env_vars = ray.remote(concurrency_groups=CONCURRENCY_GROUPS)(PolicyWorker), rank_env_vars(config)
        self._workers = [
            worker.options(**placement.options(place, env_vars)).remote(config, rank)
            for rank, place in enumerate(rank_places(config.cluster))
        ]
        for rank, actor in enumerate(self._workers):
            supervisor.supervise("trainer rank", rank, rank_log(rank), actor)

    def start(self) -> None:
        """Returns when the ranks have formed their process groups and loaded the model."""
        world = self.layout.ranks
        (store,) = self.results([self.on_rank(0, "open_store", world)])
        fused = self._on_all("start", store, world, self._model_dir)
        if self._config.cluster.device == "cuda" and not all(fused):
            logger.warning(LOCAL_LAYERS)

    def forward(self, batch: TrainBatch, minibatches_B: np.ndarray) -> PendingResult[ForwardOutput]:
        """Begins a forward pass. Results for all rows of `batch`; those of rows without a mini-batch are 0.

        A response's micro-batch has responses of its own mini-batch alone: what it is computed with does not depend on
        others.
        """
        work = self._schedule(batch, minibatches_B, self._config.train.forward_tokens)
        flat = [[rows for micro_batches in minibatches for rows in micro_batches] for minibatches in work.micro_batches]

        def combine(results: list[ForwardOutput | None]) -> ForwardOutput:
            outputs = [
                next(output for output in replica if output is not None) for replica in self._by_replica(results)
            ]
            return scatter(outputs, work.rows, batch.drawn_lengths_B)

        return PendingResult(self._supervisor, self._on_shards("forward", batch, work, flat), combine)

    def update(self, batch: TrainBatch, minibatches_B: np.ndarray, step: int) -> PendingResult[list[UpdateOutput]]:
        """Begins the optimizer steps of training step `step`, one a mini-batch."""
        work = self._schedule(batch, minibatches_B, self._config.train.micro_batch_tokens)

        def combine(results: list[list[UpdateOutput]]) -> list[UpdateOutput]:
            # Of each replica only ranks of the last stage have sums, and all of them the same.
            replicas = self._by_replica(results)
            outputs = [max(replica, key=lambda updates: len(updates[0].token_sums)) for replica in replicas]
            return [add_up(of_replicas) for of_replicas in zip(*outputs, strict=True)]

        calls = self._on_shards("update", batch, work, work.micro_batches, step)
        return PendingResult(self._supervisor, calls, combine)

    def prepare_weight_sync(self, spec: SyncSpec) -> None:
        """Makes every rank ready to send its share of the weights."""
        self._on_all("prepare_weight_sync", spec)

    def on_rank(self, rank: int, method: str, *args) -> ray.ObjectRef:
        """Calls a method of one rank; `results` waits for it."""
        return getattr(self._workers[rank], method).remote(*args)

    def results(self, calls: Sequence[ray.ObjectRef]) -> list:
        """Results of calls of ranks, in order. Raises ProcessDied, which names it, when a process of the run dies."""
        return self._supervisor.results(calls)

    def export(self, directory: str) -> None:
        """Writes the model as a Hugging Face directory."""
        self._on_all("export", directory, self._model_dir)

    def begin_save(self, directory: str) -> None:
        """Begins to write the model, optimizer and random states into a checkpoint; returns when they are copied."""
        self._on_all("begin_save", directory)

    def save_written(self) -> bool:
        """Whether all ranks have written their parts."""
        return all(self._on_all("save_written"))

    def finish_save(self) -> dict[str, str]:
        """Waits until the checkpoint's model part is complete. Returns the digests of the files that ranks have
        written, by name. Raises UserError when it could not be written."""
        return {name: digest for of_rank in self._on_all("finish_save") for name, digest in of_rank.items()}

    def damage_of(self, directory: str) -> str | None:
        """Half a sentence about a large file of a checkpoint that is not as it was written; None if all are."""
        return next(filter(None, self._on_all("damage_of", directory, self.layout.ranks)), None)

    def load(self, directory: str, same_layout: bool) -> None:
        """Continues from a checkpoint of any layout; the random states only if it is the same."""
        self._on_all("load", directory, same_layout)

    def offload(self) -> None:
        """Returns GPU memory that only updates need to the engines that share the GPUs."""
        self._on_all("offload")

    def onload(self) -> None:
        """Takes it back before an update."""
        self._on_all("onload")

    def close(self) -> None:
        """Ends the ranks; those of other nodes get CLOSE_SECONDS to clear their nodes' shared memory."""
        if self._config.cluster.nodes > 1:
            calls = [worker.weights.remote("close") for worker in self._workers]
            ray.wait(calls, num_returns=len(calls), timeout=CLOSE_SECONDS)
        for worker in self._workers:
            ray.kill(worker)

    def _schedule(self, batch: TrainBatch, minibatches_B: np.ndarray, tokens: int) -> Schedule:
        multiple = self.layout.pipeline if self.layout.virtual > 1 else 1
        # Tokens with the padding of each sequence.
        lengths_B = -(-batch.lengths_B // self.layout.sequence_multiple) * self.layout.sequence_multiple
        costs_B = lengths_B * self._shape.token_operations(lengths_B)
        return schedule(lengths_B, costs_B, minibatches_B, self.layout.data, tokens, multiple)

    def _on_all(self, method: str, *args) -> list:
        return self.results([getattr(worker, method).remote(*args) for worker in self._workers])

    def _on_shards(
        self, method: str, batch: TrainBatch, work: Schedule, micro_batches: list, *args
    ) -> list[ray.ObjectRef]:
        """Calls `method` on every rank with its data-parallel rank's rows and micro-batches."""
        self._supervisor.check()
        shards = [ray.put(batch.select(rows)) for rows in work.rows]
        calls = []
        for rank, worker in enumerate(self._workers):
            data = self.layout.coordinates(rank).data
            calls.append(getattr(worker, method).remote(shards[data], micro_batches[data], *args))
        return calls

    def _by_replica(self, results: list[T]) -> list[list[T]]:
        """Results of all ranks by data-parallel rank."""
        replicas: list[list[T]] = [[] for _ in range(self.layout.data)]
        for rank, result in enumerate(results):
            replicas[self.layout.coordinates(rank).data].append(result)
        return replicas


def scatter(outputs: list[ForwardOutput], rows: list[np.ndarray], lengths_B: np.ndarray) -> ForwardOutput:
    """The outputs of data-parallel ranks in the order of the whole batch, 0 for rows of no rank."""
    rest = np.setdiff1d(np.arange(len(lengths_B)), np.concatenate(rows))
    zeros_R = np.zeros(lengths_B[rest].sum(), dtype=np.float32)

    def ragged(values_of: Callable[[ForwardOutput], np.ndarray]) -> np.ndarray:
        return scatter_ragged([*map(values_of, outputs), zeros_R], [*rows, rest], lengths_B)

    fingerprints_BL = np.zeros((len(lengths_B), outputs[0].fingerprints_BL.shape[1]), dtype=np.float32)
    for rank_rows, output in zip(rows, outputs, strict=True):
        fingerprints_BL[rank_rows] = output.fingerprints_BL
    return ForwardOutput(
        logprobs_R=ragged(lambda output: output.logprobs_R),
        entropy_R=ragged(lambda output: output.entropy_R),
        fingerprints_BL=fingerprints_BL,
    )


def add_up(updates: tuple[UpdateOutput, ...]) -> UpdateOutput:
    """One optimizer step from the parts of the data-parallel ranks."""
    first = updates[0]
    sums = {name: sum(update.token_sums[name] for update in updates) for name in first.token_sums}
    return UpdateOutput(
        sum(update.loss for update in updates), sums, first.grad_norm, first.learning_rate, first.skipped
    )
