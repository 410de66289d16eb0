"""Probe of the processes of Ray without which the driver cannot go on: the GCS and the raylet of its machine.

Ray ends a driver that has lost the GCS in the middle of whatever it does, without naming it. Calls of actors need
neither process, so that there is time to save.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

PERIOD_SECONDS = 1.0
CONNECT_SECONDS = 5.0
UNREACHABLE_SECONDS = 30.0
"""A network may fail for shorter; a port of a machine that answers is closed when its process has ended."""


class RayProbe(AbstractContextManager):
    """Connects to both processes every PERIOD_SECONDS; `on_death` is called once, with a sentence."""

    def __init__(self, on_death: Callable[[str], None]):
        import ray

        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
        self._addresses = {
            "GCS": (host, int(port)),
            "raylet": (node["NodeManagerAddress"], node["NodeManagerPort"]),
        }
        self._on_death = on_death
        self._reached = dict.fromkeys(self._addresses, time.monotonic())
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray probe", daemon=True)

    def __enter__(self) -> "RayProbe":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def death(self) -> str | None:
        """A sentence about the process that has ended or cannot be reached, if one has."""
        for name, address in self._addresses.items():
            try:
                socket.create_connection(address, CONNECT_SECONDS).close()
            except ConnectionRefusedError:
                return f"Ray's {name} ({address[0]}:{address[1]}) has ended"
            except OSError as error:
                if time.monotonic() - self._reached[name] >= UNREACHABLE_SECONDS:
                    return f"Ray's {name} ({address[0]}:{address[1]}) cannot be reached ({error.strerror or error})"
            else:
                self._reached[name] = time.monotonic()
        return None

    def _watch(self) -> None:
        while not self._closing.wait(PERIOD_SECONDS):
            if sentence := self.death():
                self._on_death(sentence)
                return
