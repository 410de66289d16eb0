"""The Ray actor of one trainer rank.

The driver imports this module too, so torch and megatron-core are imported when the rank starts, in its own process
with its own environment.
"""

import logging
import shutil
import warnings
from typing import TYPE_CHECKING

from meds_megatron.actor.handover import hand_over
from meds_megatron.actor.messages import ForwardReply, Rendezvous, UpdateResult
from meds_megatron.actor.step_data import StepData
from meds_megatron.config import Config
from meds_megatron.weights.resharding.messages import Checksums, Staged, SyncSpec

if TYPE_CHECKING:
    from meds_megatron.weights.resharding.transport.network import Meeting


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

    def prepare_sync(self, spec: SyncSpec) -> None:
        """Makes the rank ready to send its share of the weights to engines."""
        from meds_megatron.weights.chunks import shares
        from meds_megatron.weights.resharding.sender import WeightSender
        from meds_megatron.weights.resharding.transport import local_transport

        self._meetings, device = {}, self._policy.device
        self._shared_directory = spec.directory
        place = spec.layout.coordinates(self._rank)
        parameters = shares(self._policy.chunks, self._policy.shape, spec.layout.tensor)
        self._sender = WeightSender(spec, self._rank, place.tensor, parameters, local_transport(device, spec.directory))

    def open_meeting(self, engine: int, senders: int, receivers: int) -> "Meeting":
        """Opens the meeting of an engine and the trainer ranks, with this one, that serve it over the network."""
        import ray

        from meds_megatron.weights.resharding.transport.network import open_meeting

        meeting, self._meetings[engine] = open_meeting(ray.util.get_node_ip_address(), senders, receivers)
        return meeting

    def join(self, engine: int, meeting: "Meeting", member: int) -> bool:
        """Meets the engine, as `member` of the meeting; False when it does not come."""
        from meds_megatron.weights.resharding.transport.network import Link

        store = self._meetings.pop(engine, None)
        try:
            self._sender.connect(engine, Link(meeting, member, self._policy.device, store))
        except ConnectionError as error:
            logging.getLogger(__name__).warning("engine %d did not connect: %s", engine, error)
            return False
        return True

    def stage(self, group: int, checksums: bool) -> Staged:
        return self._sender.stage(group, checksums)

    def release(self, group: int) -> None:
        self._sender.release(group)

    def send(self, group: int, engine: int, checksums: bool) -> Checksums:
        """Sends the rank's part of a group to an engine; what cannot reach it is missed there, not here."""
        try:
            return self._sender.send(group, engine, checksums)
        except ConnectionError as error:
            logging.getLogger(__name__).warning("engine %d cannot be reached: %s", engine, error)
            return {}

    def free_cached_memory(self) -> None:
        """Gives what the allocator keeps for later back to the GPU, for the engines that share it."""
        import torch

        if self._policy.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.ipc_collect()

    def close(self) -> None:
        """Removes what is left of staged weights on this node."""
        shutil.rmtree(self._shared_directory, ignore_errors=True)

    def export(self, directory: str, source: str) -> None:
        """Writes the model as a Hugging Face directory, configuration and tokenizer taken from `source`."""
        from meds_megatron.weights.export import export_hf

        export_hf(self._policy.chunks, self._policy.shape, directory, source)
