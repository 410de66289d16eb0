"""Signals that stop a run: they complete a future, which the training loop checks where it can stop."""

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

from meds_megatron.errors import Stopped
from meds_megatron.launch.slurm import EXIT_REQUEUE

logger = logging.getLogger(__name__)

EXIT_INTERRUPTED = 130
EXIT_CODES = {
    signal.SIGTERM: EXIT_REQUEUE,
    signal.SIGUSR1: EXIT_REQUEUE,
    signal.SIGINT: EXIT_INTERRUPTED,
}
SAME_SECONDS = 1.0
"""Within it signals are one request: a scheduler may send one to every process of a job, some of which pass it on."""
SHOW_CURSOR = "\x1b[?25h"


class Interruption(AbstractContextManager):
    """Handles the signals in EXIT_CODES as long as the context lasts, in the main thread.

    The first one completes `requested`, a second one ends the process at once.
    """

    def __init__(self) -> None:
        self.requested: Future[signal.Signals] = Future()
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
    def exit_code(self) -> int:
        """Exit code of the requested stop."""
        return EXIT_CODES[self.requested.result()]

    def check(self) -> None:
        """Raises Stopped if a stop has been requested."""
        if self.requested.done():
            raise Stopped(f"{self.requested.result().name} stopped the run", self.exit_code)

    def _take(self) -> None:
        first = 0.0
        while (received := self._received.get()) is not None:
            received = signal.Signals(received)
            if self.requested.done():
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
            self.requested.set_result(received)
