"""Watchdog of a run: when nothing progresses any more, it has a hanging engine or grader replaced; else it logs where
every process is and ends the attempt."""

import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import ray

from meds_megatron.errors import RunFailed
from meds_megatron.faults.supervised import SUPERVISION, Activity, dump_stacks, node_name
from meds_megatron.faults.supervision import Process, Supervisor

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0
"""Time for a process to report its activity; it needs its interpreter for an instant only."""
LONGEST_ANSWER_SECONDS = 30.0
"""The same for an engine before it is killed."""
STACKS_SECONDS = 1.0
"""Time for the processes to write their stacks."""


class Hung(RunFailed):
    """Nothing progressed for `faults.hang_minutes`."""


class Engine(Protocol):
    """An engine that can be replaced while the run continues, as `rollout.engine_record.Engine`."""

    actor: Any

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> tuple[str, int] | None: ...

    @property
    def place_name(self) -> str: ...

    def hangs(self, activity: Activity | None) -> bool: ...

    def kill_hung(self, what: str, why: str) -> None: ...


class Engines(Protocol):
    """All engines, as `rollout.pool.EnginePool`."""

    finished_requests: int

    @property
    def engines(self) -> Sequence[Engine]: ...


class Graders(Protocol):
    """The grading processes, as `reward.grading.GraderPool`."""

    verdicts: int

    def kill_hung(self, seconds: float) -> list[str]: ...


class Phases(Protocol):
    """The phases of a step, as `run.timer.PhaseTimer`."""

    phase: str
    since: float
    entered: int


class Watchdog(AbstractContextManager):
    """Progress is a new phase of the step, a result of a rank or shard, a finished request, a verdict of a grader, a
    begun micro-batch or a decode step.

    Ranks and engines are asked for their micro-batches and decode steps only while the driver itself sees no progress.
    """

    def __init__(
        self,
        minutes: float | None,
        supervisor: Supervisor,
        timer: Phases,
        pool: Engines,
        graders: Graders,
    ):
        """Kills, after `minutes` without progress, hanging engines and graders, or if there are none fails the
        supervisor's alarm with Hung; None never does."""
        self._limit = math.inf if minutes is None else 60 * minutes
        self._supervisor, self._timer, self._pool, self._graders = supervisor, timer, pool, graders
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._limit < math.inf:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._limit < math.inf:
            self._thread.join()

    def _watch(self) -> None:
        period = self._limit / 10
        seen, since = None, time.monotonic()
        work: dict[str, int] = {}
        while not self._closing.wait(period):
            progress = (
                self._timer.entered,
                self._supervisor.results_taken,
                self._pool.finished_requests,
                self._graders.verdicts,
            )
            if progress == seen and time.monotonic() - since > 2 * period:
                found = {name: activity.work for name, activity in self._activities().items() if activity}
                if any(work.get(name, count) != count for name, count in found.items()):
                    seen = None
                work |= found
            if progress != seen:
                seen, since = progress, time.monotonic()
            elif time.monotonic() - since >= self._limit:
                if self._kill_hung(period):
                    seen = None
                    continue
                self._supervisor.fail(Hung(self._report()))
                return

    def _kill_hung(self, period: float) -> bool:
        """Whether engines or graders were found to hang, and were killed to be replaced."""
        activities = self._activities(max(ANSWER_SECONDS, min(period, LONGEST_ANSWER_SECONDS)))
        if any(activities[process.name] is None for process in self._supervisor.processes):
            return False  # Whatever else hangs may wait for that rank or shard.
        hung = [engine for engine in self._pool.engines if engine.hangs(activities[engine.name])]
        for engine in hung:
            activity = activities[engine.name]
            what = f"is stuck in {activity.method} ({activity.place})" if activity else "does not answer"
            engine.kill_hung(what, self._no_progress)
        # Those that began when the progress ended; others are not late.
        killed = self._graders.kill_hung(self._limit - 2 * period)
        for grader in killed:
            logger.warning("a grader is replaced: it does not answer (%s): %s", grader, self._no_progress)
        return bool(hung or killed)

    @property
    def _actors(self) -> list[Process | Engine]:
        return [*self._supervisor.processes, *self._pool.engines]

    def _activities(self, seconds: float = ANSWER_SECONDS) -> dict[str, Activity | None]:
        """Activity of each supervised process and each engine, by name; None for one that does not answer."""
        actors = {one.name: one.actor for one in self._actors}
        calls = {name: actor.activity.options(concurrency_group=SUPERVISION).remote() for name, actor in actors.items()}
        answered, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds) if calls else ([], [])
        found: dict[str, Activity | None] = {}
        for name, call in calls.items():
            try:
                found[name] = ray.get(call) if call in answered else None
            except ray.exceptions.RayError:  # The supervisor, or the pool, reports a death.
                found[name] = None
        return found

    @property
    def _no_progress(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self._timer.since))
        return (
            f"nothing has progressed for {self._limit / 60:.3g} minutes (faults.hang_minutes) in phase "
            f"{self._timer.phase}, entered at {since}"
        )

    def _report(self) -> str:
        """One sentence about the phase and every process, whose stacks are in the logs afterwards."""
        activities = self._activities()
        states = self._write_stacks(activities)
        names: dict[str, list[str]] = defaultdict(list)
        for process in self._actors:
            activity = activities[process.name]
            if activity is None:
                state = states.get(process.place, "state unknown") if process.place else "state unknown"
                found = f"does not answer ({process.place_name}, {state})"
            else:
                found = f"in {activity.method} ({activity.place})" if activity.method else "idle"
            names[found].append(process.name)
        found = "; ".join(f"{', '.join(found)} {what}" for what, found in names.items())
        return f"{self._no_progress}: {found}; the stacks of the processes are in the run's logs"

    def _write_stacks(self, activities: dict[str, Activity | None]) -> dict[tuple[str, int], str]:
        """Makes the driver and all those processes write their stacks; their states by host and process id.

        Signals are sent by a process of the same node that answers.
        """
        on_host: dict[str, dict[int, Process | Engine]] = defaultdict(dict)
        for process in self._actors:
            if process.place:
                host, number = process.place
                on_host[host][number] = process
        states: dict[tuple[str, int], str] = {}
        dump_stacks([os.getpid()])
        for host, processes in on_host.items():
            numbers = list(processes)
            answering = [process for process in processes.values() if activities[process.name]]
            if host == node_name():
                found = dump_stacks(numbers)
            elif answering:
                options = answering[0].actor.dump_stacks.options(concurrency_group=SUPERVISION)
                calls, _ = ray.wait([options.remote(numbers)], timeout=ANSWER_SECONDS)
                found = ray.get(calls[0]) if calls else {}
            else:
                found = {}
            states |= {(host, number): state for number, state in found.items()}
        time.sleep(STACKS_SECONDS)
        return states
