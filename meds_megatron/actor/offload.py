"""Memory of a rank's GPU for the engines that share it: the optimizer's state moves to the host, gradients are dropped.

megatron-core's own `offload_to_cpu` cannot be used for float32 models, whose main weights are the model's: it would
leave the optimizer with copies that the model does not see.
"""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class Offload:
    """Between `offload` and `onload` no gradient exists, and an optimizer that `moves_optimizer` has its state in host
    memory, where checkpoints read and write it. Training is the same to the last bit with and without."""

    def __init__(self, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, moves_optimizer: bool):
        self._chunks, self._optimizer, self._moves_optimizer = chunks, optimizer, moves_optimizer
        self._on_host: dict[Tensor, Tensor] = {}
        """Host memory of each tensor of the state, which one `offload` after the other fills: pinning takes time."""
        self._offloaded = False

    def offload(self) -> None:
        """A second call does nothing."""
        if self._offloaded:
            return
        self._offloaded = True
        # Gradients of the main weights are views of the buffers.
        self._optimizer.zero_grad()
        for chunk in self._chunks:
            chunk.offload_grad_buffers(empty_cache=False)
        if self._moves_optimizer:
            moved = self._state()
            for tensor in moved:
                if tensor not in self._on_host:
                    self._on_host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                self._on_host[tensor].copy_(tensor, non_blocking=True)
            torch.cuda.synchronize()
            for tensor in moved:
                tensor.data = self._on_host[tensor]

    def onload(self) -> None:
        """Takes the memory back, with zeros for gradients. Does nothing unless it is offloaded."""
        if not self._offloaded:
            return
        self._offloaded = False
        for chunk in self._chunks:
            chunk.restore_grad_buffers(synchronize=False)
        for tensor, on_host in self._on_host.items():
            tensor.data = torch.empty_like(on_host, device=torch.cuda.current_device()).copy_(
                on_host, non_blocking=True
            )
        torch.cuda.synchronize()

    def _state(self) -> list[Tensor]:
        """Adam's moments, and the main weights where they are not the model's own."""
        tensors = []
        for part in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            tensors += [main for group in part.shard_fp32_from_float16_groups for main in group if main is not None]
            states = part.optimizer.state.values()
            tensors += [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        return tensors
