"""The engines' side of a weight update: a backend of ours in vLLM's own weight-transfer life cycle.

Every vLLM process loads `register` through the entry-point group `vllm.general_plugins`. An engine built with
`WeightTransferConfig(backend=BACKEND)` then takes `start_weight_update`, any number of `update_weights` (a bucket
each) and `finish_weight_update`, on each of its tensor-parallel ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from meds_megatron.weights.ledger import UpdateLedger
from meds_megatron.weights.shared_memory import read_bucket

BACKEND = "meds_shared_memory"

_registered = False


def register() -> None:
    """Makes the backend known to vLLM; a second call does nothing."""
    global _registered
    if not _registered:
        WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryWeightTransfer)
        _registered = True


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Shared memory needs no rendezvous."""


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    path: str
    """Of a bucket that `weights.shared_memory` wrote."""


class SharedMemoryWeightTransfer(WeightTransferEngine[NoInitInfo, BucketUpdate]):
    """Loads buckets of full Hugging Face tensors; vLLM's own weight loaders cut out this rank's part.

    An update holds every parameter of the model exactly once, in any order and any cut into buckets. A tensor that the
    model does not have or that came before fails its bucket, and one that never came fails the end of the update. The
    engine is then of no use any more: vLLM cannot take a failed update back.
    """

    init_info_cls = NoInitInfo
    update_info_cls = BucketUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)
        self._ledger = UpdateLedger(expected_names(self.model))

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        # Copies from the mapped file to the device may still be under way.
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        self.model.load_weights(self._counted_off(read_bucket(update_info.path)))

    def finish_weight_update(self) -> None:
        self._ledger.check_complete()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.model.config.tie_word_embeddings:
            # On CPU a tied head computes with a packed copy of the embedding, which vLLM leaves as it was.
            self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

    def shutdown(self) -> None:
        pass

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
