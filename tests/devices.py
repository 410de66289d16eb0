"""Devices that tests compute on: the GPUs of this machine where it has enough of them, else the CPU as everywhere.

`ranks` and `engine_device` (tests/conftest.py) choose by the functions below. These stay on the CPU, which is what they
are about, or which is all they need:

- ranks of the fixture `cpu_ranks`: bits of two trainings that are compared (kernels of GPUs may add in any order),
  bytes of a process or of CPU layers, files that cannot be written, gloo's failures, conversions;
- runs and engines of the fixture `cpu_engines`: bits of interrupted or replayed runs and of batches, processes that are
  killed, one machine that stands in for several nodes;
- tests/algorithm, tests/memory and what else is a function of small arrays. On GPUs the policy's tests run those of the
  losses.
"""

from functools import cache

GPU_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Largest difference between results of a GPU and of the CPU by data type, relative for values above 1: kernels differ
in the order of their sums. That of `bench.gpu_check`."""

GPU_ENV_VARS = {
    # Without these, float32 matrices are multiplied in TF32, with an error of 1e-3: by Transformer Engine (NVIDIA's
    # libraries) and by vLLM's attention (Triton).
    "NVIDIA_TF32_OVERRIDE": "0",
    "TRITON_F32_DEFAULT": "ieee",
    # Kernels that add in the same order each time: trainings on GPUs are compared bit by bit, too.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


@cache
def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def rank_gpus(world_size: int, gpus: int) -> list[int | None]:
    """The GPU of each of `world_size` ranks; None, the CPU, for all where `gpus` are too few."""
    return list(range(world_size)) if world_size <= gpus else [None] * world_size


def engine_kind(needed: int, gpus: int, cuda_build: bool) -> str | None:
    """`cuda` or `cpu` for a test with engines that needs `needed` GPUs if any. vLLM's CUDA build has no engines on the
    CPU, the other none on GPUs: None where the test cannot run."""
    if not cuda_build:
        return "cpu"
    return "cuda" if needed <= gpus else None


def tolerance(on_cpu: float, dtype: str = "float32", gpus: int | None = None) -> float:
    """Largest difference that a test allows: `on_cpu` on a machine without GPUs, at least GPU_TOLERANCE on one with
    some, where results of both may be compared."""
    return max(on_cpu, GPU_TOLERANCE[dtype]) if (gpu_count() if gpus is None else gpus) else on_cpu


def this_device() -> str:
    """`cuda` in a rank that has a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
