"""Program of a grader process: compares answers with math-verify, one at a time, within limits set in the kernel.

`reward.grading` starts this file with the arguments of `main`. It imports nothing of the package, so that a grader
starts fast and is the same program whatever the driver's main module is.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection

READY = b"ready"
OUT_OF_MEMORY = 3
"""Exit status after a MemoryError."""
MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a grader: an answer like 9^9^9^9 must not take the machine's memory within its time limit."""
MAX_DETAIL_CHARACTERS = 200
_PR_SET_PDEATHSIG = 1


def judge(answer: str, truth: str) -> tuple[bool, str]:
    """math-verify's verdict, (correct, detail), without a time limit.

    math-verify's own limits stay off: they use SIGALRM and count an answer that exceeds them as wrong. Its exceptions
    are raised instead of being counted as wrong.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None, raise_on_error=True)

    expected = parsed(truth)
    if all(isinstance(part, str) for part in expected):
        return False, "the ground truth is not a mathematical expression: compared as text only"
    return bool(verify(expected, parsed(answer), timeout_seconds=None, raise_on_error=True)), ""


def set_limits(parent: int) -> None:
    """Bounds the process's memory and ends it with its parent, also in the middle of a C call.

    The kernel sends SIGKILL when the parent's thread that started this process ends. If the parent (process id
    `parent`) has ended before that is set up, the process ends here.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))


def main(descriptor: int, timeout_seconds: float, parent: int) -> None:
    """Sends READY, then a verdict [correct, outcome, detail] for each [answer, truth] received, until the pipe closes.

    `descriptor` is this end of a multiprocessing pipe that carries JSON. An answer that takes `timeout_seconds` of
    processor time ends the process by SIGPROF; one that exceeds the memory limit ends it with status OUT_OF_MEMORY.
    """
    set_limits(parent)
    logging.disable(logging.CRITICAL)
    judge("x + 1", "1 + x")  # Imports and first-use set-up do not count as an answer's time.
    connection = Connection(descriptor)
    try:
        connection.send_bytes(READY)
        while True:
            answer, truth = json.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, timeout_seconds)
            try:
                correct, detail = judge(answer, truth)
                verdict = (correct, "graded", detail)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)  # The memory may still be held: the next answer needs a new process.
            except Exception as error:
                verdict = (False, "error", f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARACTERS])
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps(verdict).encode())
    except (EOFError, ConnectionError):  # The pool closed the pipe.
        pass


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
