"""Interruption of a run between two steps, by a signal or the death of Ray: it completes a future, which the training
loop checks where it can stop."""

import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any

from meds_megatron.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, RayDied, RayletDied, Stopped

logger = logging.getLogger(__name__)

EXIT_CODES = {
    signal.SIGTERM: EXIT_REQUEUE,
    signal.SIGUSR1: EXIT_REQUEUE,
    signal.SIGINT: EXIT_INTERRUPTED,
}
SAME_SECONDS = 1.0
"""Interval within which signals are one request: a scheduler may send one to every process of a job, some of which pass
it on."""
SHOW_CURSOR = "\x1b[?25h"


class Interruption(AbstractContextManager):
    """Handles the signals in EXIT_CODES as long as the context lasts, in the main thread.

    The first signal completes `requested`, a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.requested: Future[signal.Signals | str] = Future()
        """The signal, or a sentence about the death of Ray's GCS."""
        self.failed: Future[None] = Future()
        """Fails with what ends the attempt at the run at once."""
        self._signal: signal.Signals | None = None
        self._lock = threading.Lock()
        # `SimpleQueue.put` is reentrant, so a handler may call it wherever it interrupts the main thread.
        self._received: SimpleQueue[int | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._take, name="signals", daemon=True)
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        self._thread.start()
        for number in EXIT_CODES:
            self._handlers[number] = signal.signal(number, lambda received, _: self._received.put(received))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._received.put(None)
        self._thread.join()

    @property
    def is_ray_dead(self) -> bool:
        return self.requested.done() and isinstance(self.requested.result(), str)

    @property
    def reason(self) -> str:
        """Beginning of a sentence about the requested stop."""
        cause = self.requested.result()
        return cause if isinstance(cause, str) else f"{cause.name} stopped the run"

    @property
    def exit_code(self) -> int:
        """Exit code of the requested stop."""
        cause = self.requested.result()
        return EXIT_REQUEUE if isinstance(cause, str) else EXIT_CODES[cause]

    def stopped(self, sentence: str) -> Stopped:
        """Exception that ends the run after the requested stop."""
        return (RayDied if self.is_ray_dead else Stopped)(sentence, self.exit_code)

    def check(self) -> None:
        """Raises Stopped if a stop has been requested."""
        if self.requested.done():
            raise self.stopped(self.reason)

    def raylet_died(self, sentence: str) -> None:
        """Ends the attempt because the raylet has ended."""
        self.failed.set_exception(RayletDied(sentence))

    def ray_died(self, sentence: str) -> None:
        """Requests a stop because Ray's GCS has ended."""
        logger.warning("%s: the run stops before its next update and saves its last finished step", sentence)
        self._request(sentence)

    def forget_ray(self) -> None:
        """Takes back what `ray_died` and `raylet_died` did: Ray is started again. A signal's request stays."""
        with self._lock:
            self.requested, self.failed = Future(), Future()
        if self._signal is not None:
            self._request(self._signal)

    def _request(self, cause: signal.Signals | str) -> None:
        with self._lock:
            if not self.requested.done():
                self.requested.set_result(cause)

    def _take(self) -> None:
        first = 0.0
        while (received := self._received.get()) is not None:
            received = signal.Signals(received)
            if self._signal is not None:
                if time.monotonic() - first < SAME_SECONDS:
                    continue
                cursor = SHOW_CURSOR if sys.stderr.isatty() else ""
                print(f"{cursor}meds: {received.name} again: ended at once, nothing more is saved", file=sys.stderr)
                os._exit(EXIT_CODES[received])
            logger.warning(
                "%s: the run stops before its next update and saves its last finished step; a second signal ends it "
                "at once",
                received.name,
            )
            first = time.monotonic()
            self._signal = received
            self._request(received)
