"""Probe of the processes of Ray without which the driver cannot continue: the GCS and the raylet of its machine.

Ray ends a driver that has lost one of them in the middle of whatever it does, without naming it: 60 s or what is set
after the GCS, and at the next object that it stores or fetches after the raylet. Calls of actors need neither, so that
there is time to save after the one, and for a sentence after the other if it is noticed at once.
"""

import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

PERIOD_SECONDS = 0.5
CONNECT_SECONDS = 5.0
UNREACHABLE_SECONDS = 30.0
"""A network may fail for shorter; a port of a machine that answers is closed when its process has ended."""
GCS, RAYLET = "GCS", "raylet"


class RayProbe(AbstractContextManager):
    """Keeps a connection to each of the processes, which the kernel closes when one ends. The first death is reported,
    by a sentence, to `on_gcs_death` or `on_raylet_death`."""

    def __init__(self, on_gcs_death: Callable[[str], None], on_raylet_death: Callable[[str], None]):
        import ray

        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
        self._addresses = {
            GCS: (host, int(port)),
            RAYLET: (node["NodeManagerAddress"], node["NodeManagerPort"]),
        }
        self._on_death = {GCS: on_gcs_death, RAYLET: on_raylet_death}
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
        return next(filter(None, map(self._death_of, self._addresses)), None)

    def _death_of(self, name: str) -> str | None:
        connection = self._connect(name)
        if isinstance(connection, str):
            return connection
        if connection is not None:
            connection.close()
        return None

    def _connect(self, name: str) -> socket.socket | str | None:
        """A new connection, or a sentence about the death of the process; None if that is not known yet."""
        host, port = self._addresses[name]
        try:
            connection = socket.create_connection((host, port), CONNECT_SECONDS)
        except ConnectionRefusedError:
            return f"Ray's {name} ({host}:{port}) has ended"
        except OSError as error:
            if time.monotonic() - self._reached[name] < UNREACHABLE_SECONDS:
                return None
            return f"Ray's {name} ({host}:{port}) cannot be reached ({error.strerror or error})"
        self._reached[name] = time.monotonic()
        return connection

    def _watch(self) -> None:
        with ExitStack() as stack:
            connections: dict[str, socket.socket] = {}
            while not self._closing.is_set():
                for name in self._addresses.keys() - connections.keys():
                    connection = self._connect(name)
                    if isinstance(connection, str):
                        self._on_death[name](connection)
                        return
                    if connection is None:
                        self._closing.wait(PERIOD_SECONDS)
                    else:
                        connections[name] = stack.enter_context(connection)
                for name in _readable(connections):
                    if not _is_open(connections[name]):
                        connections.pop(name).close()


def _readable(connections: dict[str, socket.socket]) -> list[str]:
    """Names of connections with data or at their end; waits PERIOD_SECONDS at most."""
    poll = select.poll()
    for connection in connections.values():
        poll.register(connection, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(1000 * PERIOD_SECONDS)}
    return [name for name, connection in connections.items() if connection.fileno() in ready]


def _is_open(connection: socket.socket) -> bool:
    """Whether the process has left the connection open, after reading what it has sent: it closes idle ones at some
    point."""
    try:
        return bool(connection.recv(4096))
    except OSError:
        return False
