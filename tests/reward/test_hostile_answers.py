"""Answers made to hang, crash or fill a grader cost their limits of time and memory at most, and no other answer."""

import os
import resource

import psutil
import pytest

from meds_megatron.reward.grading import Grade, GraderPool

pytestmark = pytest.mark.usefixtures("processes")

SECONDS = 1.0
MEMORY_GIB = 0.5
ACCOUNTING_SECONDS = 0.2
"""Time by which processor time may exceed a limit: what the kernel rounds, and the end of a process."""
TIMEOUT, GRADED, NO_ANSWER = "timeout", "graded", "no_answer"

# Answers with the outcomes that they may have: how far sympy gets within a second differs between machines.
HOSTILE = {
    "a million opened braces": ("\\boxed{" + "{" * 10**6, {NO_ANSWER}),
    "a million nested braces": ("\\boxed{" + "{" * 10**6 + "1" + "}" * 10**6 + "}", {GRADED}),
    "as many nested braces as are parsed": ("\\boxed{" + "{" * 950 + "1" + "}" * 950 + "}", {TIMEOUT, GRADED}),
    "nested boxes": ("\\boxed{" * 10**5 + "1" + "}" * 10**5, {GRADED}),
    "deep fractions": ("\\boxed{" + "\\frac{1}{" * 190 + "y" + "}" * 190 + "}", {TIMEOUT, GRADED}),
    "deep roots": ("\\boxed{" + "\\sqrt{" * 250 + "2" + "}" * 250 + "}", {TIMEOUT, GRADED}),
    "10^10^10": ("\\boxed{10^{10^{10}}}", {TIMEOUT}),
    "a tower of exponents": ("\\boxed{\\log(\\log(10^{10^{10^{10}}}))}", {TIMEOUT}),
    "1900 digits": ("\\boxed{" + "9" * 900 + "^{" + "9" * 990 + "}}", {TIMEOUT, GRADED}),
    "a factorial of a billion": ("\\boxed{(10^9)!}", {TIMEOUT}),
    "nested factorials": ("\\boxed{((100!)!)!}", {TIMEOUT, GRADED}),
    "a binomial coefficient": ("\\boxed{\\binom{10^{8}}{5\\cdot 10^7}}", {TIMEOUT}),
    "an endless product": ("\\boxed{\\prod_{k=1}^{10000000} k}", {TIMEOUT}),
    "an endless sum": ("\\boxed{\\sum_{k=1}^{10^{9}} \\frac{1}{k^3+k+1}}", {TIMEOUT}),
    "an integral without a closed form": ("\\boxed{\\int_0^1 \\sin(x^{x^{x}}) e^{\\cos x^5} dx}", {TIMEOUT}),
    "a comparison of 900 letters": ("\\boxed{" + "<".join("abcdefghij" * 90) + "}", {TIMEOUT, GRADED}),
    "a matrix of 250000 entries": ("\\boxed{" + "\\\\".join(["&".join("1" * 500)] * 500) + "}", {GRADED}),
    "a matrix that is parsed": (
        "\\boxed{\\begin{pmatrix}" + "\\\\".join(["&".join(["y^2"] * 15)] * 30) + "\\end{pmatrix}}",
        {TIMEOUT, GRADED},
    ),
    "broken LaTeX": ("\\boxed{\\frac{\\sqrt}{\\left( 3 \\end{matrix} &&& \\\\ \\begin{}}}", {GRADED}),
    "null bytes": ("\\boxed{" + "\0" * 1000 + "y+1}", {GRADED}),
    "text from right to left": ("\\boxed{\u202ey+1\u2066\u200f}", {GRADED}),
    "half a surrogate pair": ("\\boxed{\ud800 + y}", {GRADED}),
    "marks above a letter": ("\\boxed{y" + "\u0301" * 1900 + "}", {GRADED}),
    "megabytes of text": ("\\boxed{" + "y+1 " * 10**6 + "}", {GRADED}),
    "a call of the system": (f"\\boxed{{\\text{{__import__('os').kill({os.getpid()}, 9)}}}}", {GRADED}),
}


@pytest.fixture(scope="module")
def pool():
    before = psutil.Process().children(recursive=True)
    with GraderPool(1, SECONDS, MEMORY_GIB) as pool:
        yield pool
    assert psutil.Process().children(recursive=True) == before


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_costs_its_limits_at_most(pool, name):
    response, outcomes = HOSTILE[name]
    assert neighbour(pool, f"{name}, before") == Grade(True, "graded")
    (pid,) = pool.pids
    process = psutil.Process(pid)
    assert process.rlimit(psutil.RLIMIT_AS) == (MEMORY_GIB * 2**30,) * 2
    spent, ended = seconds_of(process), seconds_of_ended_children()
    (grade,) = pool.grade([response], ["x+5"])
    assert (grade.correct, grade.outcome) in {(False, outcome) for outcome in outcomes}
    if grade.outcome == TIMEOUT:
        assert pool.pids == []
        assert seconds_of_ended_children() - ended - spent < SECONDS + ACCOUNTING_SECONDS
    else:
        assert pool.pids == [pid]
        assert seconds_of(process) - spent < SECONDS + ACCOUNTING_SECONDS
    assert neighbour(pool, f"{name}, after") == Grade(True, "graded")
    assert len(pool.pids) == 1


def test_hostile_answers_between_others_cost_only_themselves():
    before = psutil.Process().children(recursive=True)
    with GraderPool(2, SECONDS, MEMORY_GIB) as pool:
        hostile = ["\\boxed{10^{10^{10}}}", "\\boxed{(10^{10})!}", "\\boxed{(10^9)!}", "\\boxed{\ud800 + y}"]
        mixed = [text for n, bad in enumerate(hostile) for text in (f"\\boxed{{{n} + x}}", bad, f"\\boxed{{x - {n}}}")]
        truths = [text for n in range(len(hostile)) for text in (f"x + {n}", "x + 5", f"-{n} + x")]
        grades = pool.grade(mixed, truths)
        assert all(grade == Grade(True, "graded") for place, grade in enumerate(grades) if place % 3 != 1)
        assert [grade.outcome for grade in grades[1::3]] == [TIMEOUT, TIMEOUT, TIMEOUT, GRADED]
        assert len(psutil.Process().children(recursive=True)) <= len(before) + 2
    assert psutil.Process().children(recursive=True) == before


def neighbour(pool: GraderPool, name: str) -> Grade:
    """Verdict on an answer that is right, takes mathematics, and has not been judged before."""
    number = sum(name.encode())
    return pool.submit(f"\\boxed{{{number} + z}}", f"z + {number}").result()


def seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def seconds_of_ended_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
