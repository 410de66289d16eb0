"""The Ray actor of one trainer rank.

The driver imports this module too, so torch and megatron-core are imported when the rank starts, in its own process
with its own environment.
"""

import socket
from pathlib import Path

from meds_megatron.actor.messages import ForwardResult, Rendezvous, UpdateResult
from meds_megatron.actor.step_data import StepData
from meds_megatron.config import Config
from meds_megatron.weights.shared_memory import BucketInfo, write_bucket


class PolicyWorker:
    """One rank. The driver calls every method on all ranks at once; results come from the ranks that speak for them."""

    def __init__(self, config: Config):
        self._config = config

    def free_address(self) -> tuple[str, int]:
        """This node's address and a port that is free now: where rank 0 lets the others meet."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def start(self, rendezvous: Rendezvous, model_dir: str) -> None:
        """Meets the other ranks and loads this rank's share of the model."""
        import torch

        from meds_megatron.actor.policy import Policy
        from meds_megatron.actor.process_group import form_groups, join

        torch.set_num_threads(self._config.cluster.threads_per_rank)
        self._rank = rendezvous.rank
        device = join(rendezvous)
        form_groups(self._config.parallel, self._config.train.seed)
        self._policy = Policy(self._config, model_dir, device)

    def forward(self, data: StepData) -> ForwardResult | None:
        return self._policy.forward(data)

    def update(self, data: StepData, step: int) -> list[UpdateResult]:
        return self._policy.update(data, step)

    def publish(self, directory: str) -> list[BucketInfo]:
        """Writes the weights for the engines, a bucket a layer; one rank of each pipeline stage has buckets to give."""
        from meds_megatron.weights.gather import iterate_hf

        if not self._policy.is_first_replica:
            return []
        buckets = []
        for number, tensors in enumerate(iterate_hf(self._policy.chunks, self._policy.shape)):
            if tensors:
                buckets.append(write_bucket(Path(directory), f"rank{self._rank:05d}-{number:05d}", tensors))
        return buckets

    def export(self, directory: str, source: str) -> None:
        """Writes the model as a Hugging Face directory, configuration and tokenizer taken from `source`."""
        from meds_megatron.weights.export import export_hf

        export_hf(self._policy.chunks, self._policy.shape, directory, source)
