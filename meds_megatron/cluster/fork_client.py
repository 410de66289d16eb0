"""Program that Ray starts in place of Python for a worker that is to be a fork of a server's process (`fork_server`).

    python -I -S fork_client.py SOCKET default_worker.py ARGUMENTS

It gives the server all that a process inherits, and lives as long as the fork, which Ray then knows by its own process
id. Without a server it becomes the ordinary worker. Standard library only: this is a worker's time to start.
"""

import json
import os
import resource
import signal
import socket
import sys

STARTED = b"1"
OOM_SCORE = "/proc/self/oom_score_adj"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals of schedulers and terminals, which are for the driver; Ray kills."""


def inherited(command: list[str]) -> dict:
    """State that a fork of another process takes over to be like a child of this one's parent."""
    with open(OOM_SCORE) as file:
        oom_score = int(file.read())
    return {
        "command": command,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "nice": os.nice(0),
        "oom_score": oom_score,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "cores": sorted(os.sched_getaffinity(0)),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }


def request_fork(path: str, command: list[str]) -> socket.socket | None:
    """The connection to the fork, which lasts as long as it; None where there is no server."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
        message = json.dumps(inherited(command)).encode()
        socket.send_fds(connection, [len(message).to_bytes(8, "little")], [0, 1, 2])
        connection.sendall(message)
        started = connection.recv(1) == STARTED
    except OSError:
        started = False
    return connection if started else None


def main() -> None:
    path, *command = sys.argv[1:]
    connection = request_fork(path, command)
    if connection is None:
        os.execv(sys.executable, [sys.executable, *command])
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # The fork writes no more: this returns at its end.
    connection.recv(1)


if __name__ == "__main__":
    main()
