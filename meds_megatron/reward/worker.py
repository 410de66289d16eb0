"""Program of a grader process: compares answers, one at a time, within limits set in the kernel.

`reward.grading` starts this file with the arguments of `main`. It imports no more of the package than the rules of its
grader, so that it starts fast and is the same program whatever the driver's main module is.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

OUT_OF_MEMORY = 3
"""Exit status after a MemoryError."""
MAX_DETAIL_CHARACTERS = 200
_PR_SET_PDEATHSIG = 1


def judge(answer: str, truth: str) -> tuple[bool, str]:
    """math-verify's verdict, (correct, detail), without a time limit, and ours where the two surely differ.

    math-verify's own limits stay off: they use SIGALRM and count an answer that exceeds them as wrong. Its exceptions
    are raised instead of being counted as wrong.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    from meds_megatron.reward.differences import surely_different

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None, raise_on_error=True)

    expected = parsed(truth)
    if all(isinstance(part, str) for part in expected):
        return False, "the ground truth is not a mathematical expression: compared as text only"
    correct = bool(verify(expected, parsed(answer), timeout_seconds=None, raise_on_error=True))
    if correct and surely_different(answer, truth):
        return False, "math-verify accepts the answer, but its value or structure is different"
    return correct, ""


def judge_of(grader: str) -> Callable[[str, str], tuple[bool, str]]:
    """Function that compares (answer, truth) by the rules of that name."""
    if grader != "limo":
        return judge
    from meds_megatron.reward import limo

    return limo.judge


def main(descriptor: int, parent: int, memory_bytes: int, grader: str = "math_verify") -> None:
    """Answers each [answer, truth, seconds] with a verdict [correct, outcome, detail] until the pipe closes.

    `descriptor` is this end of a multiprocessing pipe that carries JSON; `parent` is the process id of the other end's
    owner. An answer that takes `seconds` of processor time ends the process by SIGPROF, also in the middle of a C call;
    one that takes the address space over `memory_bytes` ends it with status OUT_OF_MEMORY. The kernel kills the process
    when the parent's thread that started it ends.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # The parent ended before its end could be signalled.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    # The driver's package, also where another one is installed.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    compare = judge_of(grader)
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # The pool closed the pipe.
        while True:
            answer, truth, seconds = json.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                correct, detail = compare(answer, truth)
                verdict = (correct, "graded", detail)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)  # The memory may still be held: the next answer needs a new process.
            except Exception as error:
                verdict = (False, "error", f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARACTERS])
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(json.dumps(verdict).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
