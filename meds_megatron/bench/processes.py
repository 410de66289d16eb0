"""Processes of a benchmark, each on a GPU of its own or on the CPU, with results through pipes."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from meds_megatron.launch.device import take_gpu


class Member:
    """A process that runs `function(pipe, *arguments)`; the two ends of the pipe exchange what they like."""

    def __init__(self, gpu: int | None, function: Callable, *arguments: Any) -> None:
        """`gpu` is the number of the only GPU that it sees, None for the CPU."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, gpu, function, arguments), daemon=True)
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
    """What `function(*arguments)` returns in a process of its own."""
    member = Member(gpu, _send_result, function, arguments)
    try:
        return member.receive()
    finally:
        member.process.join(10)
        member.end()


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _run(pipe: Connection, gpu: int | None, function: Callable, arguments: tuple) -> None:
    if gpu is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        take_gpu(gpu)
    try:
        function(pipe, *arguments)
    except EOFError:
        # The benchmark has ended.
        return
    except Exception:
        pipe.send(_Failure(traceback.format_exc()))


def _send_result(pipe: Connection, function: Callable, arguments: tuple) -> None:
    pipe.send(function(*arguments))
