"""Simulated time: a heap of events, which complete futures."""

import heapq
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Any


class Event:
    """Something that happens at a time; it can be called off."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class Clock:
    """The simulated time `now`, in seconds. Events at the same time happen in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._numbers = count()
        self._awaited: set[Future] = set()
        self._completed = False
        """Whether a future was completed that is or was waited for."""

    def after(self, seconds: float, action: Callable[[], None]) -> Event:
        """Plans `action`."""
        event = Event(action)
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))
        return event

    def done_after(self, seconds: float, result: Any = None) -> Future:
        """A future that is completed in `seconds`; now, if that is 0."""
        future: Future = Future()
        if seconds == 0:
            future.set_result(result)
        else:
            self.after(seconds, lambda: None if future.done() else future.set_result(result))
        return future

    def wait_for_any(self, *futures: Future) -> None:
        """Time passes until one of `futures` is done. Raises RuntimeError when nothing happens any more."""
        for future in futures:
            if future not in self._awaited:
                self._awaited.add(future)
                future.add_done_callback(self._note)
        while not any(future.done() for future in futures):
            self._completed = False
            while not self._completed:
                if not self._events:
                    raise RuntimeError(f"at {self.now} s of simulated time nothing can happen any more: a deadlock")
                self.now, _, event = heapq.heappop(self._events)
                if event.action is not None:
                    event.action()

    def _note(self, future: Future) -> None:
        self._awaited.discard(future)
        self._completed = True

    def pass_seconds(self, seconds: float) -> None:
        """Time passes."""
        self.wait_for_any(self.done_after(seconds))
