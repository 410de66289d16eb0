"""Watchdog of a run: when nothing progresses any more, it logs where every process is and ends the attempt."""

import logging
import math
import os
import threading
import time
from collections import defaultdict
from contextlib import AbstractContextManager

import ray

from meds_megatron.errors import RunFailed
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.supervised import SUPERVISION, Activity, node_name, request_stacks
from meds_megatron.trainer.supervision import Process, Supervisor
from meds_megatron.trainer.timer import PhaseTimer

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0
"""For a process to say what it does; it needs its interpreter for an instant only."""
STACKS_SECONDS = 1.0
"""For the processes to write their stacks."""


class Hung(RunFailed):
    """Nothing progressed for `faults.hang_minutes`."""


class Watchdog(AbstractContextManager):
    """Progress is a new phase of the step, a result of a rank or shard, a finished request or a begun micro-batch.

    Ranks are asked for their micro-batches only while the driver itself sees no progress.
    """

    def __init__(self, minutes: float | None, supervisor: Supervisor, timer: PhaseTimer, pool: EnginePool):
        """`minutes` without progress fail the supervisor's alarm with Hung; None never does."""
        self._limit = math.inf if minutes is None else 60 * minutes
        self._supervisor, self._timer, self._pool = supervisor, timer, pool
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
            progress = (self._timer.entered, self._supervisor.results_taken, self._pool.finished_requests)
            if progress == seen and time.monotonic() - since > 2 * period:
                found = {name: activity.work for name, activity in self._activities().items() if activity}
                if any(work.get(name, count) != count for name, count in found.items()):
                    seen = None
                work |= found
            if progress != seen:
                seen, since = progress, time.monotonic()
            elif time.monotonic() - since >= self._limit:
                self._supervisor.fail(Hung(self._report()))
                return

    def _activities(self) -> dict[str, Activity | None]:
        """What each supervised process does, by its name; None for one that does not answer."""
        processes = self._supervisor.processes
        calls = [p.actor.activity.options(concurrency_group=SUPERVISION).remote() for p in processes]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=ANSWER_SECONDS)
        found: dict[str, Activity | None] = {}
        for process, call in zip(processes, calls, strict=True):
            try:
                found[process.name] = ray.get(call) if call in answered else None
            except ray.exceptions.RayError:  # The supervisor reports a death.
                found[process.name] = None
        return found

    def _report(self) -> str:
        """One sentence about the phase and every process, whose stacks are in the logs afterwards."""
        activities = self._activities()
        states = self._write_stacks(activities)
        names: dict[str, list[str]] = defaultdict(list)
        for process in self._supervisor.processes:
            activity = activities[process.name]
            if activity is None:
                state = states.get(process.place, "state unknown") if process.place else "state unknown"
                found = f"does not answer ({process.place_name}, {state})"
            else:
                found = f"in {activity.method} ({activity.place})" if activity.method else "idle"
            names[found].append(process.name)
        since = time.strftime("%H:%M:%S", time.localtime(self._timer.since))
        found = "; ".join(f"{', '.join(found)} {what}" for what, found in names.items())
        return (
            f"nothing has progressed for {self._limit / 60:.3g} minutes (faults.hang_minutes) in phase "
            f"{self._timer.phase}, entered at {since}: {found}; the stacks of the processes are in the run's logs"
        )

    def _write_stacks(self, activities: dict[str, Activity | None]) -> dict[tuple[str, int], str]:
        """Makes the driver and all supervised processes write their stacks; their states by host and process id.

        Signals are sent by a process of the same node that answers.
        """
        on_host: dict[str, dict[int, Process]] = defaultdict(dict)
        for process in self._supervisor.processes:
            if process.place:
                host, number = process.place
                on_host[host][number] = process
        states: dict[tuple[str, int], str] = {}
        request_stacks([os.getpid()])
        for host, processes in on_host.items():
            numbers = list(processes)
            answering = [process for process in processes.values() if activities[process.name]]
            if host == node_name():
                found = request_stacks(numbers)
            elif answering:
                options = answering[0].actor.request_stacks.options(concurrency_group=SUPERVISION)
                calls, _ = ray.wait([options.remote(numbers)], timeout=ANSWER_SECONDS)
                found = ray.get(calls[0]) if calls else {}
            else:
                found = {}
            states |= {(host, number): state for number, state in found.items()}
        time.sleep(STACKS_SECONDS)
        return states
