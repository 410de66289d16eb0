"""`python -m meds_megatron.launch.job CONFIG [KEY=VALUE]...`: the process of a Slurm job's batch script.

It starts one task on each node (`launch.node`), connects to all of them, passes the address of the first one's Ray to
the others, and lets the first one run `meds train`. Its exit code is that of the run. A run that SIGUSR1 made save
and stop, since the job's time is nearly up, exits with EXIT_REQUEUE: the job is then requeued, and `meds train`
resumes the run at the next start.

`ray symmetric-run` falls short of this: it refuses to start beside another job's Ray, its `ray stop` ends that job's as
well, and a successful run may end with the signal by which its workers were stopped.

Standard library only: with a container, this process runs outside of it.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from queue import SimpleQueue
from typing import Any

from meds_megatron.launch.slurm import EXIT_REQUEUE, SlurmJob

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
SAVE_SECONDS = 300
"""Before the end of the job's time, where Slurm's own signal (sbatch --signal) did not come earlier."""
STOP_SECONDS = 60
"""For the tasks to end after the run."""


class Job:
    """The tasks of one start of a job, one on each node; task 0 runs `meds train`."""

    def __init__(self, slurm: SlurmJob, srun_options: list[str], python: str, arguments: list[str]):
        self._slurm = slurm
        command = [python, "-m", "meds_megatron.launch.node", *arguments]
        self._command = slurm.srun(srun_options, command)
        self._events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._tasks: dict[int, Connection] = {}
        self._closing = threading.Event()
        self.cancelled = False
        """Whether this process got SIGTERM: Slurm decides what becomes of the job."""

    def run(self) -> int:
        """The exit code of the run."""
        token = secrets.token_hex(32)
        with Listener(("", 0), backlog=self._slurm.nodes + 8, authkey=token.encode()) as listener:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            srun = self._start_tasks(token, listener.address[1])
            # A stranger that connects and says nothing keeps one thread busy, not the tasks out.
            for _ in range(self._slurm.nodes + 8):
                threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            threading.Thread(target=lambda: self._events.put(("srun", srun.wait())), daemon=True).start()
            threading.Thread(target=self._watch_time, daemon=True).start()
            code = self._follow()
            self._closing.set()
            self._send_all("end")
            try:
                srun.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                # Ends the step.
                srun.kill()
            return code

    def _start_tasks(self, token: str, port: int) -> subprocess.Popen:
        # The token travels through srun's input: no command line, environment or shared file shows it. srun passes
        # signals on to all processes of the step; in a session of its own it gets none that are meant for this process.
        srun = subprocess.Popen(self._command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        assert srun.stdin is not None
        srun.stdin.write(json.dumps({"token": token, "port": port}) + "\n")
        srun.stdin.close()
        return srun

    def _accept(self, listener: Listener) -> None:
        while not self._closing.is_set():
            try:
                connection = listener.accept()
                number = connection.recv()
            except (AuthenticationError, EOFError, OSError):
                # A stranger, with whatever it sent or left out; or the listener is closed.
                continue
            self._tasks[number] = connection
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

    def _follow(self) -> int:
        """Passes messages between the tasks until the run has ended; its exit code."""
        ready, running, saving = 0, False, False
        while True:
            event, value = self._events.get()
            if event == "address":
                self._send_all("join", value)
            elif event == "ready":
                ready += 1
                if ready == self._slurm.nodes:
                    running = True
                    self._send(0, "run")
            elif event in ("save", "terminate") and not running:
                return EXIT_REQUEUE  # There is nothing to save.
            elif event == "terminate" or (event == "save" and not saving):
                saving = True
                self._send(0, event)
            elif event == "ended":
                return value
            elif event == "srun":
                return value or EXIT_FAILURE
            elif event == "lost":
                _print(f"the task on node {value} of the job is gone")
                if value == 0 or ready < self._slurm.nodes:
                    return EXIT_FAILURE

    def _send_all(self, message: str, value: Any = None) -> None:
        for number in list(self._tasks):
            self._send(number, message, value)

    def _send(self, number: int, message: str, value: Any = None) -> None:
        # Not there yet, or no longer: `_receive` reports the latter.
        with suppress(KeyError, OSError):
            self._tasks[number].send((message, value))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m meds_megatron.launch.job", description="Run in a Slurm job.")
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
    if refusal := slurm.requeue():
        _print(f"job {slurm.id} cannot be requeued ({refusal}); submit it again, and the run goes on")
        return code, False
    _print(f"job {slurm.id} was requeued, and the run goes on from its checkpoint")
    return code, True


def _print(text: str) -> None:
    print(f"meds: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
