"""The Ray actor of one trainer rank.

The driver imports this module too, so torch and megatron-core are imported when the rank starts, in its own process
with its own environment.
"""

import logging
import warnings
from pathlib import Path

from meds_megatron.actor.handover import hand_over
from meds_megatron.actor.messages import ForwardReply, Rendezvous, UpdateResult
from meds_megatron.actor.step_data import StepData
from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.weights.shared_memory import BucketInfo, write_bucket


class PolicyWorker:
    """One rank. The driver calls every method on all ranks at once; results come from the ranks that speak for them."""

    def __init__(self, config: Config):
        self._config = config
        self._store = None

    def open_rendezvous(self, world_size: int) -> tuple[str, int]:
        """Opens the store where the ranks meet, on rank 0: its host and port."""
        import ray

        from meds_megatron.actor.process_group import open_store

        host = ray.util.get_node_ip_address()
        self._store = open_store(host, world_size)
        return host, self._store.port

    def start(self, rendezvous: Rendezvous, model_dir: str) -> None:
        """Meets the other ranks and loads this rank's share of the model."""
        import torch

        # megatron-core tells at every import which optional packages it does without.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        logging.getLogger("megatron").setLevel(logging.ERROR)
        from meds_megatron.actor.policy import Policy
        from meds_megatron.actor.process_group import form_groups, join

        torch.set_num_threads(self._config.cluster.threads_per_rank)
        self._rank = rendezvous.rank
        device = join(rendezvous, self._store)
        form_groups(self._config.parallel, self._config.train.seed)
        self._policy = Policy(self._config, model_dir, device)

    def forward(self, data: StepData) -> ForwardReply | None:
        result = self._policy.forward(data)
        return None if result is None else hand_over(result, data)

    def update(self, data: StepData, step: int) -> list[UpdateResult]:
        return self._policy.update(data, step)

    def publish(self, directory: str) -> list[BucketInfo]:
        """Writes the weights for the engines, a bucket a layer; one rank of each pipeline stage has buckets to give."""
        from meds_megatron.weights.gather import iterate_hf

        if not self._policy.is_first_replica:
            return []
        buckets = []
        groups = iterate_hf(self._policy.chunks, self._policy.shape)
        try:
            for number, tensors in enumerate(groups):
                if tensors:
                    buckets.append(write_bucket(Path(directory), f"rank{self._rank:05d}-{number:05d}", tensors))
        except OSError as error:
            raise UserError(
                f"{directory}: no room for the engines' weights ({error.strerror}); give the machine, or its "
                "container, shared memory for one copy of the model"
            ) from error
        finally:
            # The other tensor-parallel ranks gather to the end: a full shared memory must not leave them waiting.
            for _ in groups:
                pass
        return buckets

    def export(self, directory: str, source: str) -> None:
        """Writes the model as a Hugging Face directory, configuration and tokenizer taken from `source`."""
        from meds_megatron.weights.export import export_hf

        export_hf(self._policy.chunks, self._policy.shape, directory, source)
