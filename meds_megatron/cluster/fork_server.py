"""Workers of Ray that are forks of one process, which has imported what they need: on CPUs most of a start is imports.

Ray starts a worker by a command, `py_executable` of its environment, here `fork_client`. The server is single-threaded,
has not imported Ray, which reads the environment of a worker while it is imported, and runs with the environment
variables that torch, vLLM and OpenMP read while they are imported. It is not for GPUs: CUDA does not survive a fork.

A fork ends with the server, with its client, and by Ray; the server ends with the thread that has started it.
"""

import gc
import json
import os
import resource
import runpy
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from shlex import quote

from meds_megatron.cluster import fork_client
from meds_megatron.processes import dies_with_parent
from meds_megatron.shared_memory import PREFIX, SHARED_MEMORY, claim, remove

MOST_CLIENTS = 128
"""Most clients that wait at a time."""
NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


class ForkServer(AbstractContextManager):
    """The server's process as the driver sees it; entering it starts the imports and does not wait for them.

    Where it ends early, for whatever reason, workers start in the ordinary way.
    """

    def __init__(self, env_vars: Mapping[str, str], function: str) -> None:
        """`function`, as `module:name`, imports what is to be shared; `env_vars` are those of the workers."""
        self.env_vars, self._function = dict(env_vars), function

    def __enter__(self) -> "ForkServer":
        # Private to the user; the next run removes what a killed driver leaves.
        self._directory = SHARED_MEMORY / f"{PREFIX}fork-{secrets.token_hex(8)}"
        self._claim = claim(self._directory)
        self._socket = self._directory / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            # Clients wait for the imports, also those that come before the server has begun.
            listener.bind(str(self._socket))
            listener.listen(MOST_CLIENTS)
            program = f"from {__name__} import serve; serve({listener.fileno()}, {os.getpid()}, {self._function!r})"
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}"],
                env=os.environ | self.env_vars | NO_GPUS,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[listener.fileno()],
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        remove(self._directory)
        os.close(self._claim)

    @property
    def py_executable(self) -> str:
        """Command that starts a worker as a fork, for Ray's runtime environment."""
        return f"{quote(sys.executable)} -I -S {quote(fork_client.__file__)} {quote(str(self._socket))}"


def serve(listener_file: int, parent: int, function: str) -> None:
    """The server's process: imports, then a fork for every client."""
    dies_with_parent(parent)
    for number in fork_client.IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # Forks that have ended are not to be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(fileno=listener_file)
    before = dict(os.environ)
    module, _, name = function.partition(":")
    getattr(import_module(module), name)()
    if len(os.listdir("/proc/self/task")) > 1:
        # The forks would not have the other threads, but the locks that these hold.
        sys.exit("the imports have started threads")
    gc.collect()
    # Collections in the forks do not write to the pages that all share.
    gc.freeze()
    server = os.getpid()
    set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
    while True:
        connection, _ = listener.accept()
        request, files = _receive(connection)
        if request is not None and os.fork() == 0:
            listener.close()
            request["environment"] |= set_by_imports
            # Ends as a program of its own does.
            return run_worker(server, connection, request, files)
        connection.close()
        for file in files:
            os.close(file)


def _receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """A client's request and its standard files; None from a client that has ended."""
    length, files, _, _ = socket.recv_fds(connection, 8, 3)
    parts, missing = [], int.from_bytes(length, "little")
    while missing and (part := connection.recv(missing)):
        parts.append(part)
        missing -= len(part)
    return (json.loads(b"".join(parts)) if parts and not missing else None), files


def run_worker(server: int, connection: socket.socket, request: dict, files: Sequence[int]) -> None:
    """The fork: becomes what the client would have been, and runs Ray's worker to its end."""
    dies_with_parent(server)
    _inherit(request, files)
    threading.Thread(target=_end_with, args=(connection,), name="fork client", daemon=True).start()
    connection.sendall(fork_client.STARTED)
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _inherit(request: dict, files: Sequence[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.nice(request["nice"] - os.nice(0))
    os.sched_setaffinity(0, request["cores"])
    resource.setrlimit(resource.RLIMIT_NOFILE, request["open_files"])
    Path(fork_client.OOM_SCORE).write_text(str(request["oom_score"]))
    for number in (*fork_client.IGNORED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def _end_with(client: socket.socket) -> None:
    """Waits for the end of the client, which Ray has killed."""
    client.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)
