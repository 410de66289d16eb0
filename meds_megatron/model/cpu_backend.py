"""megatron-core on machines without CUDA.

megatron-core hard-codes the device "cuda" in some places and calls `torch.cuda` for streams and random states.
`install()` redirects those calls to the CPU, once per process and only if CUDA is not available.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Replaces the device "cuda" by "cpu" in every torch call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The distributed optimizer sorts parameters by this name.
            return _TYPE_NAMES.get(args[0].dtype) or func(*args)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


_mode: _CudaNamesMeanCpu | None = None


def install() -> None:
    """Redirect CUDA calls of this process's main thread to the CPU; does nothing if CUDA is available."""
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    _mode = _CudaNamesMeanCpu()
    _mode.__enter__()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
