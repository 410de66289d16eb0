"""The weight-transfer backend of the engines, in vLLM's own life cycle of a weight update.

Every vLLM process loads `register` through the entry-point group `vllm.general_plugins`. An engine built with
`WeightTransferConfig(backend=BACKEND)` gets the source of its weights once (`init_weight_transfer_engine`). An update
is then, on each of its tensor-parallel ranks, a `start_weight_update`, an `update_weights` for each bucket of the
resharding plan and a `finish_weight_update`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from meds_megatron.weights.resharding.transfer import CompletenessCheck, WeightReceiver
from meds_megatron.weights.resharding.transport import TransferGroup
from meds_megatron.weights.resharding.types import Checksums, Rendezvous, SyncSpec

BACKEND = "meds_reshard"

_registered = False


def register() -> None:
    """Registers the backend with vLLM; a second call does nothing."""
    global _registered
    if not _registered:
        WeightTransferEngineFactory.register_engine(BACKEND, ReshardTransfer)
        _registered = True


@dataclass
class Connection(WeightTransferInitInfo):
    """The trainer that the weights come from."""

    spec: SyncSpec
    rendezvous: Rendezvous | None = None
    """Rendezvous of the engine's transfer group, if trainer ranks serve it over the network."""
    senders: dict[tuple[int, int], int] = field(default_factory=dict)
    """Members of the group by the pipeline stage and tensor-parallel rank whose weights they send."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket of the resharding plan."""

    bucket: int
    handles: dict[tuple[int, int], Any]
    """Transfers staged on this node, by trainer rank and engine rank; the others arrive over the network."""
    checksums: bool


class ReshardTransfer(WeightTransferEngine[Connection, BucketUpdate]):
    """Receives this rank's part of every bucket; vLLM's own weight loaders put it in place.

    An update holds every parameter of the model exactly once, in any order of buckets. A tensor that the model does not
    have or that is repeated fails its bucket, and a missing one fails the end of the update. The engine must then be
    restarted: vLLM cannot undo a failed update.
    """

    init_info_cls = Connection
    update_info_cls = BucketUpdate
    supports_draft_weight_update = False
    model: Any
    """vLLM's model, with more than torch knows of it."""

    def init_transfer_engine(self, init_info: Connection) -> None:
        rank, rendezvous = get_tensor_model_parallel_rank(), init_info.rendezvous
        group = TransferGroup(rendezvous, rendezvous.senders + rank, self.device.type) if rendezvous else None
        self._receiver = WeightReceiver(init_info.spec, rank, self.device, group, init_info.senders)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        self._completeness = CompletenessCheck(expected_names(self.model))

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # Staged memory may be freed only when it has been copied to the device.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        tensors = self._receiver.receive(update_info.bucket, update_info.handles, update_info.checksums)
        self.model.load_weights(self._checked(tensors))

    def finish_weight_update(self) -> None:
        self._completeness.finish()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model.config.tie_word_embeddings:
            # On CPU a tied head computes with a packed copy of the embedding, which vLLM leaves as it was.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

    def shutdown(self) -> None:
        pass

    @property
    def checksums(self) -> Checksums:
        """Checksums of the last bucket, where its update requested them."""
        return self._receiver.checksums

    def _checked(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            self._completeness.add(name)
            yield name, tensor


def expected_names(model: Any) -> set[str]:
    """Hugging Face names of all parameters that the model needs, its weights being in the format of a checkpoint.

    vLLM fuses projections that Hugging Face keeps apart; `packed_modules_mapping` lists them. A tied head is no
    parameter of its own.
    """
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    names: set[str] = set()
    for name, _ in model.named_parameters():
        parents, _, leaf = name.rpartition(".")
        path, _, module = parents.rpartition(".")
        names.update(f"{path}.{part}.{leaf}" for part in fused[module]) if module in fused else names.add(name)
    return names - {"lm_head.weight"} if model.config.tie_word_embeddings else names
