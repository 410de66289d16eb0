"""Supervision of a run's trainer ranks and memory shards: a death is noticed wherever the driver waits."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray

from meds_megatron.errors import RunFailed, UserError
from meds_megatron.faults.interruption import Interruption
from meds_megatron.faults.supervised import SUPERVISION, failed_process, failure_reason, process_exists
from meds_megatron.logs import last_log_line

T = TypeVar("T")

TICK_SECONDS = 0.25
SETTLE_SECONDS = 0.75
"""Time from the first death to the alarm: processes that die together are named together."""
PEER_SECONDS = 5.0
"""Time to wait for the death of another process after an error, which may follow from that death."""
END_SECONDS = 10.0
MOST_NAMED = 8
HARDWARE_ERRORS = {"AcceleratorError", "DistError"}
"""torch's classes, with those derived from them, for a GPU or a network that failed under a process."""


class ProcessDied(RunFailed):
    """Trainer ranks or memory shards that died, with the node, the reason and the end of the log of the first."""


class HardwareFailed(RunFailed):
    """A process whose GPU or network failed, with its node and the error."""


@dataclass
class Process:
    """A supervised actor."""

    kind: str
    number: int
    log: str
    """Name of the process in its log."""
    actor: ray.actor.ActorHandle
    ended: Future
    """Fails when the process dies."""
    identity: Future
    """Node and process id."""
    died_at: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"

    @property
    def place(self) -> tuple[str, int] | None:
        """Node and process id; None as long as they are not known."""
        return self.identity.result() if self.identity.done() and not self.identity.exception() else None

    def is_gone(self) -> bool:
        """Whether the process has ended and freed what it had."""
        return self.ended.done() and not (self.place and process_exists(self.place))

    @property
    def place_name(self) -> str:
        if self.place:
            return "process {1} on {0}".format(*self.place)
        return failed_process(self.ended.exception()) if self.ended.done() else "process unknown"


@dataclass(frozen=True)
class PendingResult(Generic[T]):
    """Calls of supervised actors that are under way."""

    supervisor: "Supervisor"
    references: Sequence[ray.ObjectRef]
    combine: Callable[[list[Any]], T]
    """Their results, in order, as one."""

    def futures(self) -> list[Future]:
        """Done when the calls are, each with its result or error."""
        return [reference.future() for reference in self.references]

    def result(self) -> T:
        """Waits for the calls. Raises what `Supervisor.results` raises."""
        return self.combine(self.supervisor.results(self.references))


class Supervisor(AbstractContextManager):
    """Supervises the actors of one attempt at a run. A context manager; on exit it waits until the actors, which the
    caller has ended by then, are gone from their GPUs and memory.

    All waits for trainer ranks and memory shards are made with `results`. Others end with `alarm`.
    """

    def __init__(self, run_dir: str, interruption: Interruption | None = None):
        self.alarm: Future[None] = Future()
        """Fails with the RunFailed, or Stopped before `started`, that ends this attempt."""
        self.processes: list[Process] = []
        self.results_taken = 0
        """Calls that have returned: grows as long as the ranks and shards make progress."""
        self._run_dir, self._interruption = run_dir, interruption or Interruption()
        self._lock = threading.Lock()
        self._started = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def __enter__(self) -> "Supervisor":
        self._interruption.failed.add_done_callback(self._fail_as)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        deadline = time.monotonic() + END_SECONDS
        while not all(process.is_gone() for process in self.processes) and time.monotonic() < deadline:
            time.sleep(TICK_SECONDS / 5)

    def _fail_as(self, failed: Future[None]) -> None:
        error = failed.exception()
        assert isinstance(error, Exception)
        self.fail(error)

    def supervise(self, kind: str, number: int, log: str, actor: ray.actor.ActorHandle) -> None:
        """Supervises a new actor of a `SupervisedActor` class whose concurrency groups are CONCURRENCY_GROUPS."""
        ended = actor.watch.options(concurrency_group=SUPERVISION).remote().future()
        identity = actor.process.options(concurrency_group=SUPERVISION).remote().future()
        self.processes.append(Process(kind, number, log, actor, ended, identity))

    def started(self) -> None:
        """Leaves stops to the training loop from now on. Raises Stopped if one was requested before."""
        with self._lock:
            self._started = True
        self.check()

    def check(self) -> None:
        """Raises what ends this attempt, if that is known. Called before objects are stored or fetched in Ray, which
        ends the driver where there is no raylet."""
        if self.alarm.done():
            self.alarm.result()

    def fail(self, error: Exception) -> None:
        """Ends the attempt with `error`; the first error counts."""
        with self._lock:
            if not self.alarm.done():
                self.alarm.set_exception(error)

    def results(self, references: Sequence[ray.ObjectRef]) -> list[Any]:
        """Results of calls of supervised actors, in order.

        Raises UserError as it was raised there; ProcessDied (or what else the alarm fails with) as soon as it is
        known, also instead of the errors that other processes raise for want of a dead one; HardwareFailed; and any
        other error as is.
        """
        found: dict[ray.ObjectRef, Any] = {}
        pending = list(references)
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=TICK_SECONDS)
            self.check()
            try:
                found |= zip(ready, ray.get(ready), strict=True)
            except UserError:
                raise
            except ray.exceptions.RayError as error:
                self._raise_cause(error)
                if isinstance(error, ray.exceptions.RayTaskError) and _is_of_hardware(error.cause):
                    # torch's advice follows in the lines after the first.
                    reason = str(error.cause).partition("\n")[0]
                    raise HardwareFailed(f"{self._name_of(error)} failed: {reason}") from error
                raise
            self.results_taken += len(ready)
        return [found[reference] for reference in references]

    def _raise_cause(self, error: Exception) -> None:
        try:
            self.alarm.result(timeout=PEER_SECONDS)
        except TimeoutError:
            return
        except Exception as cause:
            raise cause from error

    def _name_of(self, error: ray.exceptions.RayTaskError) -> str:
        """The process that raised, with its node and id."""
        raised = failed_process(error)
        for process in self.processes:
            if process.place and raised == f"process {process.place[1]} on {process.place[0].rpartition(' ')[2]}":
                return f"{process.name} ({process.place_name})"
        return raised

    def _watch(self) -> None:
        while not self._closing.wait(TICK_SECONDS):
            if dead := self._settled_deaths():
                self.fail(ProcessDied(self._describe_deaths(dead)))
            with self._lock:
                stop = self._interruption.requested
                if stop.done() and not self._started and not self.alarm.done():
                    sentence = f"{self._interruption.reason} before training continued: there was nothing new to save"
                    self.alarm.set_exception(self._interruption.stopped(sentence))

    def _settled_deaths(self) -> list[Process]:
        """The dead processes, first death first, once the first is SETTLE_SECONDS ago."""
        now = time.monotonic()
        for process in self.processes:
            if process.died_at is None and process.ended.done():
                process.died_at = now
        deaths = [(process.died_at, process) for process in self.processes if process.died_at is not None]
        deaths.sort(key=lambda death: death[0])
        return [process for _, process in deaths] if deaths and now - deaths[0][0] >= SETTLE_SECONDS else []

    def _describe_deaths(self, dead: list[Process]) -> str:
        """One sentence about the dead processes: all by name, the first one with the end of its log."""
        first = dead[0]
        error = first.ended.exception()
        names = ", ".join(process.name for process in dead[1 : 1 + MOST_NAMED])
        more = f" and {len(dead) - 1 - MOST_NAMED} more" if len(dead) > 1 + MOST_NAMED else ""
        others = f", then {names}{more}" if names else ""
        words = last_log_line(self._run_dir, first.log)
        logged = f"; the end of its log: {words}" if words else ""
        return f"{first.name} ({first.place_name}) died{others}: {failure_reason(error)}{logged}"


def _is_of_hardware(error: BaseException) -> bool:
    return any(error_class.__name__ in HARDWARE_ERRORS for error_class in type(error).__mro__)
