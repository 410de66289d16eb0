"""`python -m meds_megatron.cluster.slurm.job CONFIG [KEY=VALUE]...`: the process of a Slurm job's batch script.

It starts one task on each node (`cluster.slurm.node`), connects to all of them, passes the address of the first one's
Ray to the others, and lets the first one run `meds train`. Its exit code is that of the run. A run that SIGUSR1 made
save and stop, since the job's time is nearly up, exits with EXIT_REQUEUE: the job is then requeued, and `meds train`
resumes the run at the next start.

`ray symmetric-run` falls short of this: it refuses to start next to another job's Ray, its `ray stop` ends that job's
as well, and a successful run may end with the signal by which its workers were stopped.

Standard library only: with a container, this process runs outside of it.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from queue import Empty, SimpleQueue
from typing import Any

from meds_megatron.cluster.slurm.environment import SIGNALLED, SlurmJob, exit_code
from meds_megatron.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER_ERROR

SAVE_SECONDS = 300
"""Seconds before the end of the job's time at which the run is saved where Slurm's own signal (sbatch --signal) did not
come earlier."""
STOP_SECONDS = 60
"""Time for the tasks to end after the run."""
FIRST_TASK_MINUTES = 60
"""Time for the first task to connect, which sends the time that the others may take (`faults.start_minutes`): srun
waits for containers on its own account."""
STRANGERS = 128
"""Other connections that may arrive at the same instant as the tasks'."""
HANDSHAKE_SECONDS = 30
"""Time for a connection to show that it is a task's."""
ACCEPT_PAUSE_SECONDS = 0.1


class Job:
    """The tasks of one start of a job, one on each node; task 0 runs `meds train`."""

    def __init__(self, slurm: SlurmJob, srun_options: list[str], python: str, arguments: list[str]):
        self._slurm = slurm
        command = [python, "-m", "meds_megatron.cluster.slurm.node", *arguments]
        self._command = slurm.srun(srun_options, command)
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._tasks: dict[int, Connection] = {}
        self._receivers: list[threading.Thread] = []
        self._joined: set[int] = set()
        """Tasks that have the address of Ray's head."""
        self._ready: set[int] = set()
        """Tasks whose node has Ray."""
        self._closing = threading.Event()
        self.cancelled = False
        """Whether this process got SIGTERM: Slurm decides what becomes of the job."""

    def run(self) -> int:
        """The exit code of the run."""
        token = secrets.token_hex(32)
        with Listener(("", 0), backlog=self._slurm.nodes + STRANGERS) as listener:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            srun = self._start_tasks(token, listener.address[1])
            threading.Thread(target=self._accept, args=(listener, token.encode()), daemon=True).start()
            threading.Thread(target=lambda: self._events.put(("srun", srun.wait())), daemon=True).start()
            threading.Thread(target=self._watch_time, daemon=True).start()
            code = self._start()
            if code is None:
                code = self._follow()
            self._end_tasks(srun)
            return code

    def _start_tasks(self, token: str, port: int) -> subprocess.Popen:
        # The token travels through srun's input: no command line, environment or shared file shows it. srun passes
        # signals on to all processes of the step; in a session of its own it gets none that are meant for this process.
        srun = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        assert srun.stdin is not None
        # An srun that ends at once is reported as one.
        with suppress(BrokenPipeError), srun.stdin as pipe:
            pipe.write(json.dumps({"token": token, "port": port}) + "\n")
        return srun

    def _end_tasks(self, srun: subprocess.Popen) -> None:
        deadline = time.monotonic() + STOP_SECONDS
        self._closing.set()
        self._send_all("end")
        try:
            srun.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            # Ends the step.
            srun.kill()
        # Tasks may survive an srun that was killed; they remove what they have on their nodes.
        for receiver in list(self._receivers):
            receiver.join(max(0.0, deadline - time.monotonic()))

    def _accept(self, listener: Listener, key: bytes) -> None:
        while not self._closing.is_set():
            try:
                connection = listener.accept()
            except OSError:
                # No file descriptor is left, or the listener is closed.
                self._closing.wait(ACCEPT_PAUSE_SECONDS)
                continue
            # A thread for each: a stranger that sends nothing keeps no task waiting.
            threading.Thread(target=self._serve, args=(connection, key), daemon=True).start()

    def _serve(self, connection: Connection, key: bytes) -> None:
        """Receives what a task sends, once the connection has shown within HANDSHAKE_SECONDS that it is a task's."""
        limit = threading.Timer(HANDSHAKE_SECONDS, _shut_down, [connection])
        limit.daemon = True
        limit.start()
        with connection:
            try:
                deliver_challenge(connection, key)
                answer_challenge(connection, key)
                number, start_minutes = connection.recv()
            except (AuthenticationError, EOFError, OSError):
                # A stranger, with whatever it sent or left out.
                return
            finally:
                limit.cancel()
            self._receivers.append(threading.current_thread())
            self._tasks[number] = connection
            if self._closing.is_set():
                self._send(number, "end")
            self._events.put(("connected", start_minutes))
            self._receive(number, connection)

    def _receive(self, number: int, connection: Connection) -> None:
        try:
            while True:
                self._events.put(connection.recv())
        except (EOFError, OSError):
            self._events.put(("lost", number))

    def _watch_time(self) -> None:
        if self._slurm.end_time is not None:
            time.sleep(max(0.0, self._slurm.end_time - SAVE_SECONDS - time.time()))
            self._events.put(("save", None))

    def _on_signal(self, number: int, _) -> None:
        self.cancelled |= number != signal.SIGUSR1
        self._events.put(("save" if number == signal.SIGUSR1 else "terminate", None))

    def _start(self) -> int | None:
        """Passes the address of Ray's head to every task, whenever it connects, until Ray is up on all nodes; the exit
        code of the job where that fails."""
        address, minutes = None, None
        deadline = time.monotonic() + 60 * FIRST_TASK_MINUTES
        while len(self._ready) < self._slurm.nodes:
            try:
                event, value = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                _print(self._late_start(minutes))
                return EXIT_FAILURE
            if event == "connected" and minutes is None:
                minutes, deadline = value, time.monotonic() + 60 * value
            elif event == "address":
                address = value
            elif event == "ready":
                self._ready.add(value)
            elif event in ("save", "terminate"):
                _print(f"the job is to end before its run began, and there is nothing to save: {self._missing()}")
                return EXIT_REQUEUE
            elif event == "srun":
                return self._srun_ended(value)
            elif event == "lost":
                self._report_lost(value)
                return EXIT_FAILURE
            if address is not None:
                self._join(address)
        return None

    def _join(self, address: str) -> None:
        for number in set(self._tasks) - self._joined:
            self._joined.add(number)
            self._send(number, "join", address)

    def _follow(self) -> int:
        """Lets the first task run `meds train` and passes signals on until it has ended; its exit code."""
        self._send(0, "run")
        saving = False
        while True:
            event, value = self._events.get()
            if event == "terminate" or (event == "save" and not saving):
                saving = True
                self._send(0, event)
            elif event == "ended":
                if value not in (0, EXIT_REQUEUE):
                    _print(f"{_end_of('meds train', value)}; {self._advice(value)}")
                return value
            elif event == "srun":
                return self._srun_ended(value)
            elif event == "lost":
                self._report_lost(value)
                if value == 0:
                    return EXIT_FAILURE

    def _srun_ended(self, returncode: int) -> int:
        """The exit code of a job whose srun ended before its run."""
        code = exit_code(returncode)
        _print(f"{_end_of('srun', code)} before the run did; {self._advice(code)}")
        return code or EXIT_FAILURE

    def _advice(self, code: int) -> str:
        """Advice to the user about a run, or an srun, that ended with `code`."""
        if code <= SIGNALLED:
            return "the lines above say why"
        memory = ""
        if code == SIGNALLED + signal.SIGKILL:
            memory = f"it may have been out of memory (sacct -j {self._slurm.id} --format=State,MaxRSS; sbatch --mem); "
        return f"{memory}submit the job again, and the run continues from its last checkpoint"

    def _report_lost(self, number: int) -> None:
        _print(f"the task on {self._slurm.node_names()[number]} of the job is gone")

    def _late_start(self, minutes: float | None) -> str:
        if minutes is None:
            return f"no task of the job has connected within {FIRST_TASK_MINUTES} minutes: {self._missing()}"
        return (
            f"the job's nodes were not ready {minutes:g} minutes after the first (faults.start_minutes): "
            f"{self._missing()}; see what these nodes do, or allow more time"
        )

    def _missing(self) -> str:
        """The nodes on which the start has not come to its end."""
        names = self._slurm.node_names()
        silent = [name for number, name in enumerate(names) if number not in self._tasks]
        without_ray = [name for number, name in enumerate(names) if number in self._tasks.keys() - self._ready]
        parts = [f"no task has connected from {', '.join(silent)}"] if silent else []
        parts += [f"Ray is not up on {', '.join(without_ray)}"] if without_ray else []
        return "; ".join(parts)

    def _send_all(self, message: str, value: Any = None) -> None:
        for number in list(self._tasks):
            self._send(number, message, value)

    def _send(self, number: int, message: str, value: Any = None) -> None:
        # A task that is not there any more: `_receive` reports it.
        with suppress(OSError):
            self._tasks[number].send((message, value))


def _end_of(process: str, code: int) -> str:
    try:
        return f"{process} was ended by {signal.Signals(code - SIGNALLED).name}"
    except ValueError:
        return f"{process} ended with exit status {code}"


def _shut_down(connection: Connection) -> None:
    """Ends the wait of another thread for something from the connection."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_RDWR)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m meds_megatron.cluster.slurm.job", description="Run in a Slurm job."
    )
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION", help="such as --container-image=...")
    parser.add_argument("--python", default=sys.executable, help="in the container, if there is one")
    parser.add_argument("arguments", nargs="+", metavar="CONFIG [KEY=VALUE]", help="of meds train")
    options = parser.parse_args(arguments)
    slurm = SlurmJob.from_environment()
    if slurm is None:
        _print("this is no Slurm job; start it with sbatch, or `meds train` without Slurm")
        return EXIT_USER_ERROR
    code, _ = run_job(slurm, options.srun, options.python, options.arguments)
    return code


def run_job(slurm: SlurmJob, srun_options: list[str], python: str, arguments: list[str]) -> tuple[int, bool]:
    """Runs `meds train` with `arguments` on the job's nodes and requeues the job where the run is to be continued; the
    run's exit code, and whether the job was requeued: Slurm then ends this process."""
    job = Job(slurm, srun_options, python, arguments)
    code = job.run()
    if code != EXIT_REQUEUE or job.cancelled:
        return code, False
    refusal = slurm.requeue()
    if refusal:
        _print(f"job {slurm.id} cannot be requeued ({refusal}); submit it again, and the run continues")
        return code, False
    _print(f"job {slurm.id} was requeued, and the run continues from its checkpoint")
    return code, True


def _print(text: str) -> None:
    print(f"meds: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
