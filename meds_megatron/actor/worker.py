"""The Ray actor of one trainer rank.

The driver imports this module too, so torch and megatron-core are imported when the rank starts, in its own process
with its own environment variables.
"""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch, UpdateOutput
from meds_megatron.cluster.device import require_gpu
from meds_megatron.config import Config
from meds_megatron.config.network import LOOPBACK, network_env_vars, on_one_machine
from meds_megatron.faults.supervised import SupervisedActor, ignore_stop_signals
from meds_megatron.lean_imports import lean_megatron
from meds_megatron.logs import configure_process_logging
from meds_megatron.weights.resharding.types import SyncSpec
from meds_megatron.weights.store_address import StoreAddress

if TYPE_CHECKING:
    from meds_megatron.actor.policy import Policy
    from meds_megatron.weights.sealed_store import SealedStore

logger = logging.getLogger(__name__)


def rank_env_vars(config: Config) -> dict[str, str]:
    """Environment variables that torch and NCCL read in a trainer rank: all of them, from the config."""
    return {
        "OMP_NUM_THREADS": str(config.cluster.threads_per_rank),
        "MKL_NUM_THREADS": str(config.cluster.threads_per_rank),
        # Overlap of tensor-parallel communication and compute relies on one hardware queue.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_CUMEM_ENABLE": "0",
        # Huge pages: the first copy of a checkpoint makes all the pages it is in.
        "THP_MEM_ALLOC_ENABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **network_env_vars(config.cluster),
        # torch and megatron-core warn at every start; errors are raised.
        "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning",
    }


def rank_log(rank: int) -> str:
    """Name of a rank's log."""
    return f"rank{rank:05d}"


def silence_megatron() -> None:
    """megatron-core warns at every import of the optional packages that are absent."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def import_without_gpu() -> None:
    """Imports what a rank without a GPU needs; a fork server does it once for all ranks."""
    silence_megatron()
    with lean_megatron():
        import meds_megatron.actor.background_save
        import meds_megatron.actor.checkpoint
        import meds_megatron.actor.policy  # noqa: F401


class PolicyWorker(SupervisedActor):
    """One rank. The driver calls every method on all ranks at once; results come from the output ranks."""

    _policy: "Policy"
    """Policy of this rank, set by `start`."""

    def __init__(self, config: Config, rank: int):
        ignore_stop_signals()
        configure_process_logging(config.run_dir, rank_log(rank))
        self._config, self._rank = config, rank
        self._store: SealedStore | None = None

    @property
    def work(self) -> int:  # type: ignore[override]
        """Micro-batches begun."""
        return self._policy.micro_batches_begun if hasattr(self, "_policy") else 0

    def _host(self) -> str:
        """Address at which the other processes of the run reach this one."""
        import ray

        return LOOPBACK if on_one_machine(self._config.cluster) else ray.util.get_node_ip_address()

    def open_store(self, world_size: int) -> StoreAddress:
        """Opens the store through which the ranks connect, on rank 0."""
        from meds_megatron.weights.store import open_store

        self._store = open_store(self._host(), world_size)
        return self._store.address

    def start(self, store: StoreAddress, world_size: int, model_dir: str) -> bool:
        """Connects to the other ranks through rank 0's `store` and loads this rank's share of the model. Returns
        whether its layers are Transformer Engine's."""
        import torch

        silence_megatron()
        if self._config.cluster.device == "cuda":
            require_gpu()
        else:
            import_without_gpu()
        from meds_megatron.actor.background_save import HostCopies
        from meds_megatron.actor.policy import Policy
        from meds_megatron.actor.process_group import form_groups, join
        from meds_megatron.model.attention import use_transformer_engine

        torch.set_num_threads(self._config.cluster.threads_per_rank)
        timeout = self._config.cluster.collective_timeout_minutes
        device = join(store, self._rank, world_size, timeout, self._store)
        form_groups(self._config.parallel, self._config.train.seed, timeout)
        self._policy = Policy(self._config, model_dir, device)
        self._copies = HostCopies()
        logger.info("rank %d of %d has loaded its share of %s on %s", self._rank, world_size, model_dir, device)
        return use_transformer_engine()

    def forward(self, batch: TrainBatch, micro_batches: list[np.ndarray]) -> ForwardOutput | None:
        return self._policy.forward(batch, micro_batches)

    def update(self, batch: TrainBatch, minibatches: list[list[np.ndarray]], step: int) -> list[UpdateOutput]:
        return self._policy.update(batch, minibatches, step)

    def prepare_weight_sync(self, spec: SyncSpec) -> None:
        """Makes the rank ready to send its share of the weights to engines."""
        from meds_megatron.weights.chunks import rank_parameters
        from meds_megatron.weights.resharding.transfer import WeightSender

        parameters = rank_parameters(self._policy.chunks, self._policy.shape, spec.layout.tensor)
        host = self._host()
        self._weight_sender = WeightSender(spec, self._rank, parameters, self._policy.device, host)

    def weights(self, method: str, *args):
        """Calls a method of this rank's WeightSender."""
        return getattr(self._weight_sender, method)(*args)

    def offload(self) -> None:
        """Returns all GPU memory that only updates need, and what torch's allocator has unused, to the engines that
        share the GPU."""
        import torch

        self._policy.offload.offload()
        if self._policy.device == "cuda":
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Takes back what `offload` returned, before an update."""
        self._policy.offload.onload()

    def begin_save(self, directory: str) -> None:
        """Begins to write this rank's part of a checkpoint; training may continue."""
        from meds_megatron.actor.checkpoint import PolicySave

        policy = self._policy
        self._save = PolicySave(policy.chunks, policy.optimizer, policy.shape, directory, self._copies)

    def save_written(self) -> bool:
        """Whether `finish_save` would not wait for this rank."""
        return self._save.written

    def finish_save(self) -> dict[str, str]:
        """Waits until all parts are written and completes the checkpoint's model. Returns the digests of the files
        that this rank has written, by name."""
        return self._save.finish()

    def damage_of(self, directory: str, world_size: int) -> str | None:
        """Half a sentence about a damaged file among this rank's share of a checkpoint's large ones."""
        from meds_megatron.actor.checkpoint import damage_of

        return damage_of(Path(directory), self._rank, world_size)

    def load(self, directory: str, same_layout: bool) -> None:
        """Fills the policy with a checkpoint."""
        from meds_megatron.actor.checkpoint import load

        policy = self._policy
        load(policy.chunks, policy.optimizer, policy.shape, directory, same_layout)

    def export(self, directory: str, source: str) -> None:
        """Writes the model as a Hugging Face directory, configuration and tokenizer taken from `source`."""
        from meds_megatron.weights.export import export_hf

        export_hf(self._policy.chunks, self._policy.shape, directory, source)
