"""One grader process as its parent sees it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from meds_megatron.reward.worker import READY

Task = tuple[str, str]
"""(ground truth, answer)"""

START_SECONDS = 180.0
"""Time a process may take for its imports, on a crowded machine."""
PATIENCE = 4.0
"""How many times its limit an answer may take by the wall clock, while the machine gives its process no time to run."""
ALARM_GRACE_SECONDS = 5.0
"""How long after its parent's limit a process whose parent is gone ends itself."""
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class GraderProcess:
    """Runs `meds_megatron.reward.worker` in a session of its own, so that a Ctrl-C does not reach it.

    It is a fresh interpreter rather than a child of multiprocessing, which would import the driver's main module again.
    `tasks` are the answers it holds, the one in progress first. An answer may take `timeout_seconds` of processor time,
    so that a crowded machine does not turn answers into timeouts, and PATIENCE times that by the wall clock. `deadline`
    is when to look whether the process is overdue (`time.monotonic`). Holding at most what fits into a pipe, it can
    always be written to without blocking.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.tasks: deque[Task] = deque()
        self.ready = False
        self.ended = False
        self.deadline = self._last_moment = time.monotonic() + START_SECONDS
        self._processor_limit = 0.0
        self._unread = b""
        search_path = [str(_PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "meds_megatron.reward.worker", str(timeout_seconds + ALARM_GRACE_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
        )
        os.set_blocking(self.fileno(), False)

    def fileno(self) -> int:
        """What to wait on until `receive` has something to tell."""
        return self._process.stdout.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def idle(self) -> bool:
        return self.ready and not self.ended and not self.tasks

    def overdue(self) -> bool:
        """Whether its time is up, be it for the start or for the answer in progress; if not, moves `deadline` on."""
        now = time.monotonic()
        if self.idle or now < self.deadline:
            return False
        left = self._processor_limit - self._processor_seconds()
        if left <= 0 or now >= self._last_moment:
            return True
        self.deadline = min(now + left, self._last_moment)
        return False

    def send(self, tasks: Sequence[Task]) -> None:
        """Hands tasks to an idle process; when it has died meanwhile, sets `ended` and takes none."""
        try:
            self._process.stdin.write(json.dumps(tasks, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        except BrokenPipeError:
            self.ended = True
            return
        self.tasks.extend(tasks)
        self._start_clock()

    def receive(self) -> list[tuple[Task, dict]]:
        """The verdicts that have come in since the last call, without waiting; sets `ready` and `ended`."""
        while chunk := self._read():
            self._unread += chunk
        *lines, self._unread = self._unread.split(b"\n")
        if lines and not self.ended:
            self._start_clock()
        if lines and not self.ready:
            if lines.pop(0) != READY.encode():
                raise RuntimeError(f"Grader process {self.pid} speaks out of turn")
            self.ready = True
        return [(self.tasks.popleft(), json.loads(line)) for line in lines]

    def _start_clock(self) -> None:
        """An answer begins: from here its time counts."""
        now = time.monotonic()
        self.deadline, self._last_moment = now + self.timeout_seconds, now + PATIENCE * self.timeout_seconds
        self._processor_limit = self._processor_seconds() + self.timeout_seconds

    def _processor_seconds(self) -> float:
        """Processor time that the process has used, user and system."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self) -> bytes:
        """What can be read at once; empty when that is nothing, and at the end, which sets `ended`."""
        chunk = self._process.stdout.read(1 << 16)
        if chunk is None:
            return b""
        self.ended = self.ended or not chunk
        return chunk

    def exit_code(self) -> int:
        """How a process that has ended did so: negative for a signal, as in subprocess."""
        return self._process.wait()

    @property
    def stopped_itself(self) -> bool:
        """Whether the alarm for orphans went off: the parent was held up beyond the limit and the grace."""
        return self.exit_code() == -signal.SIGPROF

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def finish(self) -> None:
        """Ends a process that has nothing to do, by ending its input; kills it when it does not listen."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
