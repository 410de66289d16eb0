"""Actors that the driver supervises: base class and what is known of one that failed."""

import os
import re
import signal
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from meds_megatron.logs import STACKS_SIGNAL
from meds_megatron.processes import process_state

SUPERVISION = "supervision"
"""Concurrency group of the methods of `SupervisedActor`, which answer while another method of the actor runs."""
CONCURRENCY_GROUPS = {SUPERVISION: 3}
LONGEST_REASON = 300
RAYS_WRAPPER = "_resume_span"
"""Function around every method of a Ray actor."""


@dataclass(frozen=True)
class Activity:
    """Current activity of an actor."""

    method: str | None
    """Method of the actor that is being called; None between two calls."""
    place: str = ""
    """Innermost function, file and line."""
    work: int = 0
    """Pieces of work begun since the actor started."""


class SupervisedActor:
    """Base of an actor class that is made with `concurrency_groups=CONCURRENCY_GROUPS`."""

    work = 0
    """Pieces of work begun: as long as it grows, the actor is not stuck."""
    waiting_methods: tuple[str, ...] = ("watch",)
    """Methods whose calls wait for something to happen: no activity."""

    def watch(self) -> None:
        """Never returns: the call fails when the actor's process dies."""
        threading.Event().wait()

    def process(self) -> tuple[str, int]:
        """Node and process id."""
        return node_name(), os.getpid()

    def activity(self) -> Activity:
        """The method that is being called, found on the stacks of the process's other threads."""
        for thread, innermost in sys._current_frames().items():
            methods: list[str] = []
            frame: FrameType | None = innermost
            while frame is not None:
                if frame.f_locals.get("self") is self and frame.f_code.co_name != RAYS_WRAPPER:
                    methods.append(frame.f_code.co_name)  # The outermost one last.
                frame = frame.f_back
            if thread != threading.get_ident() and methods and methods[-1] not in self.waiting_methods:
                code = innermost.f_code
                place = f"{code.co_name}, {Path(code.co_filename).name}:{innermost.f_lineno}"
                return Activity(methods[-1], place, self.work)
        return Activity(None, work=self.work)

    def dump_stacks(self, processes: list[int]) -> dict[int, str]:
        """`dump_stacks` on the actor's node."""
        return dump_stacks(processes)


def node_name() -> str:
    """Host name and address of this node of the Ray cluster."""
    import ray

    return f"{socket.gethostname()} at {ray.util.get_node_ip_address()}"


def process_exists(place: tuple[str, int]) -> bool:
    """Whether a process, by its node and id, still has anything: Ray reports an end before the kernel is done with it.
    False for those on other nodes."""
    return place[0] == node_name() and Path(f"/proc/{place[1]}").exists()


def ignore_stop_signals() -> None:
    """Leaves the signals that stop a run to the driver, also where a scheduler sends them to every process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def dump_stacks(processes: list[int]) -> dict[int, str]:
    """Makes processes of this machine that log with `logs.configure_process_logging` write the stacks of their threads
    into their logs, in C, whatever their interpreter waits for; returns the kernel's name for the state of each
    (`stopped` processes do not write before they are continued)."""
    states = {}
    for process in processes:
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(process, STACKS_SIGNAL)
            states[process] = process_state(process)
    return states


def failed_process(error: BaseException | None) -> str:
    """Process id and address of the actor that a Ray error is about, as far as the error has them."""
    text = str(error)
    process = re.search(r"\bpid[:=] ?(\d+)", text)
    address = re.search(r"\bip[:=] ?([\w.:]*\w)", text)
    return f"process {process[1] if process else 'unknown'} on {address[1] if address else 'an unknown node'}"


def failure_reason(error: BaseException | None) -> str:
    """Last line of what an actor raised, or of what Ray reports about its death, without Ray's list of common
    causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = lines[-1]
    if detail := re.search(r"Worker exit detail: (.*)", reason):
        reason = re.split(r" (?:Some common causes|There are some potential root causes)", detail[1])[0]
    return reason.rstrip(".")[:LONGEST_REASON]
