r"""Grading: whether the answer in a response equals the ground truth, by one of `reward.rules.RULES`.

By the default rules the answer is in the response's last `\boxed{}`, and most answers are decided by `reward.answers`.
The others are compared in grader processes (`reward.worker`), which are killed when an answer takes too long: by
math-verify, and by `reward.differences`, which rejects what math-verify accepts by mistake. A comparison that fails is
counted as a failure, not as a wrong answer.

The processes are not a pebble ProcessPool (5.2.3) because a worker killed while it is idle, or while it holds the lock
of the pipe that all workers share, stops the whole pool, the workers import the driver's main module again, and those
of a fork server outlive a killed driver.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Literal

from meds_megatron.config.schema import RewardConfig
from meds_megatron.processes import process_state
from meds_megatron.reward import worker
from meds_megatron.reward.notation import normalised
from meds_megatron.reward.rules import RULES, Rules

MAX_ANSWER_CHARACTERS = 2000
"""A longer answer or ground truth is not the answer to a problem; parsing it would only use up the time limit."""
MAX_FAILED_STARTS = 3
START_SECONDS = 45.0
"""Limit of processor time for a new process's first answer, which pays for the imports."""
PATIENCE = 4.0
"""Wall-clock bound of one answer, in multiples of its limit of processor time."""
MAX_REMEMBERED = 100_000
"""Verdicts kept so that equal pairs are judged once."""


@dataclass(frozen=True)
class Grade:
    """Verdict on one response. `correct` is False whenever `outcome` is not "graded"; `detail` gives the reason."""

    correct: bool
    outcome: Literal["graded", "no_answer", "timeout", "error"]
    detail: str = ""

    @property
    def failed(self) -> bool:
        """The grading timed out or ended in an error: the response is neither right nor wrong."""
        return self.outcome in ("timeout", "error")


NO_ANSWER = Grade(False, "no_answer", "no closed \\boxed{} with something in it")


class GraderPool(AbstractContextManager):
    """Grades responses in up to `workers` processes, which start when first needed and are replaced when they end.

    An answer may take `timeout_seconds` of processor time, so that a crowded machine does not turn answers into
    timeouts, and PATIENCE times that by the wall clock; then its process is killed and its outcome is "timeout". An
    answer that takes its process over `memory_gib` of address space, or whose process ends for another reason, is an
    "error".

    `grader` names the rules. Any thread may call the methods. Each process has a thread that waits for its verdicts;
    callbacks of a future run in that thread. Use the pool as a context manager: an interpreter with an open pool exits
    after the last verdict only.
    """

    def __init__(
        self,
        workers: int,
        timeout_seconds: float,
        memory_gib: float = RewardConfig.memory_gib,
        grader: str = RewardConfig.grader,
    ) -> None:
        if workers < 1 or timeout_seconds <= 0:
            raise ValueError(
                f"GraderPool needs workers >= 1 and timeout_seconds > 0, not {workers} and {timeout_seconds}"
            )
        self.workers = workers
        self.timeout_seconds = timeout_seconds
        self.memory_gib = memory_gib
        self.grader = grader
        self.rules = RULES[grader]
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="grader")
        self._processes: dict[int, GraderProcess] = {}
        self.verdicts = 0
        """Answers judged by the processes, failures too: grows as long as they make progress."""
        self._closed = False
        self._lock = threading.Lock()
        self._futures: dict[tuple[str, str], Future[Grade]] = {}

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running graders."""
        return [process.pid for process in list(self._processes.values()) if process.poll() is None]

    def submit(self, response_text: str, answer: str) -> "Future[Grade]":
        """Verdict on a response whose ground truth is `answer`; plain comparisons resolve at once.

        Equal pairs of boxed answer and ground truth are judged once and share their future, unless that failed. The
        future raises RuntimeError when grader processes do not start, CancelledError when the pool is closed first.
        """
        boxed = self.rules.extract(response_text)
        if not boxed:
            return _resolved(NO_ANSWER)
        if plain := _plain_verdict(boxed, answer, self.rules):
            return _resolved(plain)
        pair = boxed, answer
        with self._lock:
            future = self._futures.get(pair)
            if future is None or _failed(future):
                if len(self._futures) >= MAX_REMEMBERED:
                    del self._futures[next(iter(self._futures))]
                future = self._futures[pair] = self._executor.submit(self._judge, *pair)
            return future

    def grade(self, texts: Sequence[str], answers: Sequence[str]) -> list[Grade]:
        """Verdicts on responses, each with its ground truth in `answers`; closes the pool when it fails."""
        pairs = list(zip(texts, answers, strict=True))
        try:
            futures = [self.submit(text, answer) for text, answer in pairs]
            return [future.result() for future in futures]
        except BaseException:
            self.close()
            raise

    def kill_hung(self, seconds: float) -> list[str]:
        """Kills the processes that have been at one answer for `seconds`, whose grading then has failed; returns what
        they were."""
        now, found = time.monotonic(), []
        for process in list(self._processes.values()):
            since = process.since
            if since is None or now - since < seconds:
                continue
            with suppress(FileNotFoundError):
                found.append(f"process {process.pid} on {socket.gethostname()}, {process_state(process.pid)}")
                process.kill()
        return found

    def close(self) -> None:
        """Kills the processes and cancels the unfinished futures. The pool cannot be used again."""
        self._closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in list(self._processes.values()):
            process.kill()
        self._executor.shutdown()
        for process in self._processes.values():
            process.end()  # Also those that started meanwhile.

    def _judge(self, answer: str, truth: str) -> Grade:
        """The verdict of the calling thread's process."""
        process = self._processes.get(threading.get_ident())
        if process is None or process.poll() is not None:
            process = self._start()
        pair = self.rules.spell(answer), self.rules.spell(truth)
        grade = process.grade(*pair, self.timeout_seconds)
        self.verdicts += 1
        if self._closed:
            raise CancelledError("The grader pool was closed")
        if grade.outcome == "timeout" and self.rules.slow_is_wrong:
            return Grade(False, "graded", grade.detail)
        return grade

    def _start(self) -> "GraderProcess":
        """New process for the calling thread, which has graded one answer to have its imports and set-up done."""
        for _ in range(MAX_FAILED_STARTS):
            process = self._processes[threading.get_ident()] = GraderProcess(self.memory_gib, self.grader)
            if self._closed:
                raise CancelledError("The grader pool was closed")
            grade = process.grade("x + 1", "1 + x", START_SECONDS)
            if grade.correct:
                return process
            process.end()
        raise RuntimeError(
            f"Grader processes do not start, {MAX_FAILED_STARTS} times in a row: {grade.detail}; see standard error, "
            f"and make `{sys.executable} -c 'import math_verify'` work"
        )


class GraderProcess(subprocess.Popen):
    """New interpreter that runs `reward.worker` and ends with the thread that started it.

    Its session is its own, so that Ctrl-C in the terminal does not reach it.
    """

    def __init__(self, memory_gib: float, grader: str = RewardConfig.grader) -> None:
        self._memory_gib = memory_gib
        self.since: float | None = None
        """Time (time.monotonic) at which it got the answer that it is judging; None between two."""
        self._pipe, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            arguments = map(str, (descriptor, os.getpid(), int(memory_gib * 2**30), grader))
            super().__init__(
                [sys.executable, "-P", worker.__file__, *arguments],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def grade(self, answer: str, truth: str, timeout_seconds: float) -> Grade:
        """Verdict on one answer; unless math-verify returned or raised, the process has ended afterwards."""
        in_time = True
        self.since = time.monotonic()
        try:
            job = json.dumps([answer, truth, timeout_seconds], ensure_ascii=False)
            self._pipe.send_bytes(job.encode("utf-8", "replace"))
            in_time = self._pipe.poll(PATIENCE * timeout_seconds)
            if in_time:
                return Grade(*json.loads(self._pipe.recv_bytes()))
        except (EOFError, OSError):
            pass  # The process has ended, and its exit code has the reason.
        finally:
            self.since = None
        code = self.end()
        if not in_time or code == -signal.SIGPROF:
            return Grade(False, "timeout", f"no verdict on {answer!r} in {timeout_seconds} seconds")
        if code == worker.OUT_OF_MEMORY:
            return Grade(False, "error", f"MemoryError: more than {self._memory_gib:g} GiB for {answer!r}")
        return Grade(False, "error", f"the grader process ended with exit code {code} on {answer!r}")

    def end(self) -> int:
        """Exit code of the process, negative for a signal; kills it if it has not ended."""
        self.kill()
        return self.wait()


def _failed(future: "Future[Grade]") -> bool:
    """Whether a future has ended without a verdict: the cause may be gone when the same pair is submitted again."""
    return future.done() and (future.cancelled() or future.exception() is not None or future.result().failed)


def _resolved(grade: Grade) -> Future[Grade]:
    future: Future[Grade] = Future()
    future.set_result(grade)
    return future


def _plain_verdict(answer: str, truth: str, rules: Rules) -> Grade | None:
    """Verdict where it takes no mathematics, else None."""
    if not normalised(truth):
        return Grade(False, "error", f"the ground truth {truth!r} holds nothing to compare with")
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return Grade(False, "graded", f"an answer of {len(answer)} characters counts as wrong")
    if len(truth) > MAX_ANSWER_CHARACTERS:
        return Grade(False, "error", f"a ground truth of {len(truth)} characters is too long to compare with")
    same = rules.compare(answer, truth)
    return None if same is None else Grade(same, "graded")
