"""Imports without what they drag in: libraries import packages that no run uses only because they are installed, and
compile functions at import that only a GPU profits from. That is 2 of megatron-core's 4 CPU seconds, and 60 MiB, in
every trainer rank.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden(*packages: str) -> Iterator[None]:
    """While open, packages that are not imported yet cannot be: whoever has an alternative to them takes it."""
    hiding = [package for package in packages if package not in sys.modules]
    for package in hiding:
        # Python's own way to say that there is none: an import raises ModuleNotFoundError.
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for package in hiding:
            del sys.modules[package]


@contextmanager
def uncompiled() -> Iterator[None]:
    """While open, functions that torch.compile decorates stay as they are: it imports inductor for the first one."""
    import torch

    compile_function = torch.compile
    torch.compile = _unchanged
    try:
        yield
    finally:
        torch.compile = compile_function


def _unchanged(model: Callable | None = None, **_: Any) -> Callable:
    """torch.compile as a decorator, with or without arguments."""
    return (lambda function: function) if model is None else model


@contextmanager
def lean_megatron() -> Iterator[None]:
    """While open, megatron-core is imported without wandb, which its inference engine logs with, and without inductor.
    For processes that compute on the CPU."""
    with hidden("wandb"), uncompiled():
        yield


@contextmanager
def lean_transformers() -> Iterator[None]:
    """While open, transformers is imported without scikit-learn and SciPy, which it uses for assisted decoding and for
    losses of vision models."""
    with hidden("sklearn", "scipy"):
        yield


@contextmanager
def lean_vllm() -> Iterator[None]:
    """While open, vLLM is imported without SciPy, which it uses for audio, and, if it comes before Ray, without Ray.
    For processes that compute on the CPU, where no engine of vLLM's uses Ray."""
    with lean_transformers(), hidden("ray"):
        yield
