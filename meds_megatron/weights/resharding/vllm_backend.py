"""The engines' side of a weight update: a backend of ours in vLLM's own weight-transfer life cycle.

Every vLLM process loads `register` through the entry-point group `vllm.general_plugins`. An engine built with
`WeightTransferConfig(backend=BACKEND)` is told once where its weights come from (`init_weight_transfer_engine`). For
every update it then takes, on each of its tensor-parallel ranks, `start_weight_update`, an `update_weights` for each
group of the resharding plan and `finish_weight_update`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from meds_megatron.weights.resharding.ledger import UpdateLedger
from meds_megatron.weights.resharding.messages import Checksums, SyncSpec
from meds_megatron.weights.resharding.receiver import WeightReceiver
from meds_megatron.weights.resharding.transport import local_transport
from meds_megatron.weights.resharding.transport.network import Link, Meeting

BACKEND = "meds_reshard"

_registered = False


def register() -> None:
    """Makes the backend known to vLLM; a second call does nothing."""
    global _registered
    if not _registered:
        WeightTransferEngineFactory.register_engine(BACKEND, ReshardTransfer)
        _registered = True


@dataclass
class Connection(WeightTransferInitInfo):
    """The trainer that the weights come from."""

    spec: SyncSpec
    meeting: Meeting | None = None
    """With the trainer ranks that serve this engine over the network, if any do."""
    senders: dict[tuple[int, int], int] = field(default_factory=dict)
    """Members of the meeting by the share they send: pipeline stage and tensor-parallel rank."""


@dataclass
class GroupUpdate(WeightTransferUpdateInfo):
    """One group of the resharding plan."""

    group: int
    handles: dict[tuple[int, int], Any]
    """Parcels staged on this node, by trainer rank and engine rank; the others are on their way over the network."""
    checksums: bool


class ReshardTransfer(WeightTransferEngine[Connection, GroupUpdate]):
    """Takes this rank's part of every group of the plan; vLLM's own weight loaders put it in place.

    An update holds every parameter of the model exactly once, in any order of groups. A tensor that the model does not
    have or that came before fails its group, and one that never came fails the end of the update. The engine is then
    of no use any more: vLLM cannot take a failed update back.
    """

    init_info_cls = Connection
    update_info_cls = GroupUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: Connection) -> None:
        rank, device = get_tensor_model_parallel_rank(), self.device.type
        meeting = init_info.meeting
        self._receiver = WeightReceiver(
            init_info.spec,
            rank,
            self.device,
            local_transport(device, init_info.spec.directory),
            meeting and Link(meeting, meeting.senders + rank, device),
            init_info.senders,
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        self._ledger = UpdateLedger(expected_names(self.model))

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # What was staged may be given back only when it has been copied to the device.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: GroupUpdate) -> None:
        tensors = self._receiver.receive(update_info.group, update_info.handles, update_info.checksums)
        self.model.load_weights(self._counted_off(tensors))

    def finish_weight_update(self) -> None:
        self._ledger.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model.config.tie_word_embeddings:
            # On CPU a tied head computes with a packed copy of the embedding, which vLLM leaves as it was.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

    def shutdown(self) -> None:
        pass

    @property
    def checksums(self) -> Checksums:
        """Of the last group, where the update asked for them."""
        return self._receiver.checksums

    def _counted_off(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self._ledger.take(name)
            yield name, tensor


def expected_names(model: nn.Module) -> set[str]:
    """Hugging Face names of all parameters that the model needs, its weights being in the format of a checkpoint.

    vLLM fuses projections that Hugging Face keeps apart; the model says which. A tied head is no parameter of its own.
    """
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    names: set[str] = set()
    for name, _ in model.named_parameters():
        parents, _, leaf = name.rpartition(".")
        path, _, module = parents.rpartition(".")
        names.update(f"{path}.{part}.{leaf}" for part in fused[module]) if module in fused else names.add(name)
    return names - {"lm_head.weight"} if model.config.tie_word_embeddings else names
