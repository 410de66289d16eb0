"""Processes of a benchmark, each on a GPU of its own or on the CPU, with results through pipes."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from meds_megatron.cluster.placement import Place, visible_gpus


class Member:
    """A process that runs `function(pipe, *arguments)`; the two ends of the pipe exchange what they like."""

    def __init__(self, gpu: int | None, function: Callable, *arguments: Any) -> None:
        """`gpu` is the number of its GPU, None for the CPU."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
        with placed_on(gpu):
            self.process.start()
        theirs.close()

    def call(self, *message: Any) -> Any:
        """Sends a message and waits for the answer."""
        self.pipe.send(message)
        return self.receive()

    def receive(self) -> Any:
        """Raises RuntimeError, with its traceback, when the process has failed."""
        try:
            answer = self.pipe.recv()
        except EOFError as error:
            raise RuntimeError("a process of the benchmark died") from error
        if isinstance(answer, _Failure):
            raise RuntimeError(answer.text)
        return answer

    def end(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.join()


def result_of(gpu: int | None, function: Callable, *arguments: Any) -> Any:
    """Result of `function(*arguments)` in a process of its own."""
    member = Member(gpu, _send_result, function, arguments)
    try:
        return member.receive()
    finally:
        member.process.join(10)
        member.end()


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


@contextmanager
def placed_on(gpu: int | None) -> Iterator[None]:
    """While open, processes that are started are on this GPU, counted from 0, as the actors of a run are: the first
    that they see, followed by the others, whose memory they may open. With None they see none.

    They have the variables from the start: a library that looks for GPUs while it is imported, as the functions that a
    process runs are, leaves later ones without effect. Float32 matrices are not multiplied in TF32, which Transformer
    Engine takes for them whatever torch is set to (`cublaslt_gemm.cu`).
    """
    visible = "" if gpu is None else ",".join(visible_gpus(Place(0, (gpu,)), _gpu_names()))
    variables = {"CUDA_VISIBLE_DEVICES": visible, "NVIDIA_TF32_OVERRIDE": "0"}
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ.update(before)


def _gpu_names() -> list[str]:
    """Names of this process's GPUs, as in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


def _run(pipe: Connection, function: Callable, arguments: tuple) -> None:
    try:
        function(pipe, *arguments)
    except EOFError:
        # The benchmark has ended.
        return
    except Exception:
        pipe.send(_Failure(traceback.format_exc()))


def _send_result(pipe: Connection, function: Callable, arguments: tuple) -> None:
    pipe.send(function(*arguments))
