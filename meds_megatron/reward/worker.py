"""A grader process: reads pairs of ground truth and answer from standard input, writes a verdict on each.

One line in is a JSON list of [truth, answer] pairs; one line out is the verdict on the next pair, in order, after a
first line that says that the imports are done. The process ends with its standard input. Run by `reward.process`.
"""

import json
import logging
import os
import resource
import signal
import sys

READY = "ready"
MEMORY_LIMIT_BYTES = 4 << 30
"""Address space of a grader: an answer like 9^9^9^9 must not take the machine's memory while its time runs."""
MAX_DETAIL_CHARACTERS = 200


def judge(truth: str, answer: str) -> dict[str, object]:
    """math-verify's verdict: {"correct", "outcome", "detail"}. It has no time limit: whoever waits has one."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def parsed(text: str) -> list:
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None, raise_on_error=True)

    expected = parsed(truth)
    if all(isinstance(part, str) for part in expected):
        return _verdict(False, "graded", "the ground truth is no mathematical expression: compared as text only")
    return _verdict(verify(expected, parsed(answer), timeout_seconds=None, raise_on_error=True), "graded", "")


def _verdict(correct: bool, outcome: str, detail: str) -> dict[str, object]:
    return {"correct": bool(correct), "outcome": outcome, "detail": detail[:MAX_DETAIL_CHARACTERS]}


def main(alarm_seconds: float) -> None:
    """Serves until standard input ends.

    The parent kills a grader that is slow. Should the parent itself be gone, the kernel's alarm ends this process after
    `alarm_seconds` of processor time on one answer, even in the middle of a C call.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What a library prints must not mix with the replies.

    judge("x + 1", "1 + x")  # What the first answer costs beyond its own, in imports above all, is not its fault.
    try:
        print(READY, file=replies, flush=True)
        for line in sys.stdin:
            for truth, answer in json.loads(line):
                signal.setitimer(signal.ITIMER_PROF, alarm_seconds)
                out_of_memory = False
                try:
                    verdict = judge(truth, answer)
                except Exception as error:
                    out_of_memory = isinstance(error, MemoryError)
                    verdict = _verdict(False, "error", f"{type(error).__name__}: {error}")
                signal.setitimer(signal.ITIMER_PROF, 0)
                print(json.dumps(verdict), file=replies, flush=True)
                if out_of_memory:
                    return  # What filled it may still do; the parent starts a fresh one for the rest.
    except BrokenPipeError:
        os._exit(0)  # The parent is gone; flushing at exit would fail again.


if __name__ == "__main__":
    main(float(sys.argv[1]))
