"""Time of a step, by phase."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meds_megatron.run.console import Console


class PhaseTimer:
    """Seconds spent in each phase of a step.

    with timer("rollout"): ...      # adds to time/rollout, however often it is entered
    timer.take()                    # {"time/rollout": 2.1, ..., "time/step": 4.0}, and starts the next step
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter):
        """`console` shows the phase that is under way; `clock` gives the time in seconds."""
        self._console, self._clock = console, clock
        self.phase, self.since, self.entered = "start", time.time(), 0
        """Phase that was entered last, the time since the epoch at which it was, and how many were."""
        self._start_step()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._console:
            self._console.phase(phase)
        self.phase, self.since, self.entered = phase, time.time(), self.entered + 1
        started = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] += self._clock() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase, and of the whole step, since the last call; what follows counts for the next step."""
        metrics = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["time/step"] = self._clock() - self._step_started
        self._start_step()
        return metrics

    def _start_step(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._step_started = self._clock()
