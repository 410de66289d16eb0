import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from meds_megatron.reward.grading import Grade, GraderPool

SLOW = "\\prod_{k=1}^{10000000} k"
"""Keeps math-verify busy for longer than any test waits."""


def boxed(answer: str) -> str:
    return f"Adding it up gives $\\boxed{{{answer}}}$."


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_seconds=30) as pool:
        yield pool


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    ("truth", "answer", "correct"),
    [
        ("72", "72", True),
        ("72", "73", False),
        ("72", "72.00", True),
        ("1000", "1,000", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{3}", "0.33", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(\\pi/2, 3)", False),
        ("2k+2", "2(k+1)", True),
        ("2k+2", "2k+1", False),
        ("\\sqrt{50}", "5\\sqrt{2}", True),
        ("3,5,7", "7, 5, 3", True),
        ("6-5i", "-5i+6", True),
        ("x \\in [-2,7]", "[-2,7]", True),
        ("27", "27^\\circ", True),
        ("5", "5 \\text{ cm}", True),
        ("5", "x = 5", True),
        ("\\text{east}", "\\text{west}", False),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{bmatrix} 1 \\\\ 2 \\end{bmatrix}", True),
    ],
)
def test_equal_answers_are_correct_in_whatever_form(pool, truth, answer, correct):
    assert pool.grade([boxed(answer)], [truth]) == [Grade(correct, True, "graded")]


def test_the_last_box_is_the_answer(pool):
    responses = ["first \\boxed{1}, better \\boxed{2}", "first \\boxed{2}, better \\boxed{1}"]
    assert [grade.correct for grade in pool.grade(responses, ["2", "2"])] == [True, False]


@pytest.mark.parametrize("response", ["", "the answer is 5", "cut off at \\boxed{5", "\\boxed{}", "\\boxed{ }"])
def test_without_an_answer_in_a_box_there_is_none(pool, response):
    (grade,) = pool.grade([response], ["5"])
    assert (grade.correct, grade.boxed, grade.outcome) == (False, False, "no_answer")


def test_nothing_to_grade(pool):
    assert pool.grade([], []) == []


def test_each_response_needs_a_ground_truth(pool):
    with pytest.raises(ValueError, match="zip"):
        pool.grade(["\\boxed{1}"], [])


def test_a_ground_truth_that_is_no_mathematics_is_compared_as_text(pool):
    truth = "\\frac{"
    same, other = pool.grade([boxed("\\frac{ }"), boxed("x+1")], ["\\frac{}", truth])
    assert same.correct
    assert (other.correct, other.outcome) == (False, "graded")


def test_an_empty_ground_truth_is_an_error(pool):
    (grade,) = pool.grade([boxed("5")], ["$ $"])
    assert (grade.correct, grade.outcome) == (False, "error")
    assert "nothing to compare" in grade.detail


def test_a_ground_truth_without_end_is_an_error(pool):
    (grade,) = pool.grade([boxed("x")], ["1+" * 5000 + "1"])
    assert (grade.correct, grade.outcome) == (False, "error")


def test_long_answers_go_out_in_small_batches(pool):
    long = "x" + " + 1" * 450
    answers = [f"{long} + {n}" for n in range(4)] + ["é" * 1900]
    assert [grade.outcome for grade in pool.grade([boxed(answer) for answer in answers], [long] * 5)] == ["graded"] * 5


def test_an_endless_box_is_not_parsed(pool):
    (grade,) = pool.grade([boxed("1+" * 5000 + "1")], ["x"])
    assert (grade.correct, grade.outcome) == (False, "graded")
    assert "10001 characters" in grade.detail


def test_order_and_repeats_are_kept(pool):
    answers = ["x+1", "1+x", "x+2", "none", "x+1"] * 40
    responses = [boxed(answer) if answer != "none" else "?" for answer in answers]
    expected = [True, True, False, False, True] * 40
    assert [grade.correct for grade in pool.grade(responses, ["x+1"] * 200)] == expected


def test_every_real_answer_equals_itself(pool, shared_data):
    lines = (shared_data / "data" / "math500.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert all(grade.correct for grade in pool.grade([boxed(answer) for answer in answers], answers))


def test_an_answer_that_takes_too_long_costs_only_itself():
    others = [f"x + {n}" for n in range(20)]
    with GraderPool(workers=1, timeout_seconds=1.5) as pool:
        answers = others[:7] + [SLOW] + others[7:]
        grades = pool.grade([boxed(answer) for answer in answers], ["y"] * 7 + ["5"] + ["y"] * 13)
        assert [grade.outcome for grade in grades] == ["graded"] * 7 + ["timeout"] + ["graded"] * 13
        assert "in 1.5 seconds" in grades[7].detail
        assert pool.grade([boxed("1+x")], ["x+1"])[0].correct


def test_a_grader_that_is_stopped_runs_out_of_patience():
    with GraderPool(workers=1, timeout_seconds=0.5) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        os.kill(pool._processes[0].pid, signal.SIGSTOP)
        begin = time.monotonic()
        grades = pool.grade([boxed("1+x"), boxed("2+x")], ["x+1", "x+2"])
        assert time.monotonic() - begin > 4 * 0.5
        assert [grade.outcome for grade in grades] == ["timeout", "graded"]


def test_a_grader_that_is_killed_is_replaced_and_its_answer_is_an_error():
    with GraderPool(workers=1, timeout_seconds=60) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        (process,) = pool._processes

        def kill_while_busy():
            wait_until(lambda: process.tasks)
            time.sleep(0.3)
            os.kill(process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill_while_busy)
        killer.start()
        grades = pool.grade([boxed(SLOW), boxed("1+x"), boxed("2+x")], ["5", "x+1", "x+1"])
        killer.join()
        assert [(grade.outcome, grade.correct) for grade in grades] == [
            ("error", False),
            ("graded", True),
            ("graded", False),
        ]
        assert "exit code -9" in grades[0].detail


def test_a_grader_that_died_between_calls_costs_no_answer():
    with GraderPool(workers=1, timeout_seconds=60) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        pid = pool._processes[0].pid
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not is_running(pid))
        assert pool.grade([boxed("1+x")], ["x+1"]) == [Grade(True, True, "graded")]


def test_an_exception_is_an_error_with_its_name():
    source = """
import math_verify
from meds_megatron.reward.worker import main
real = math_verify.verify
def verify(gold, answer, **settings):
    if "lost" in str(answer): raise KeyError("lost")
    return real(gold, answer, **settings)
math_verify.verify = verify
main(30)
"""
    tasks = json.dumps([["x", "\\text{lost}"], ["x + 1", "1 + x"]]) + "\n"
    run = subprocess.run([sys.executable, "-c", source], input=tasks, capture_output=True, text=True, timeout=120)
    ready, *verdicts = run.stdout.splitlines()
    assert ready == "ready"
    assert json.loads(verdicts[0]) == {"correct": False, "outcome": "error", "detail": "KeyError: 'lost'"}
    assert json.loads(verdicts[1]) == {"correct": True, "outcome": "graded", "detail": ""}


def test_closing_leaves_no_process():
    pool = GraderPool(workers=2, timeout_seconds=60)
    pool.grade([boxed("1+x"), boxed("2+x")], ["x", "x"])
    pids = [process.pid for process in pool._processes]
    assert len(pids) == 2
    pool.close()
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize(("how", "last"), [(signal.SIGKILL, "time.sleep(600)"), (signal.SIGINT, "grade(SLOW)")])
def test_no_grader_outlives_its_parent(how, last):
    source = f"""
import time
from meds_megatron.reward.grading import GraderPool
SLOW = {SLOW!r}
pool = GraderPool(workers=1, timeout_seconds=600)
grade = lambda answer: pool.grade(["\\\\boxed{{" + answer + "}}"], ["5"])
grade("1+x")
print(pool._processes[0].pid, flush=True)
{last}
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    grader = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(grader)
    parent.send_signal(how)
    parent.wait(timeout=120)
    assert wait_until(lambda: not is_running(grader))


def test_a_busy_grader_whose_parent_is_gone_ends_by_its_alarm():
    command = [sys.executable, "-m", "meds_megatron.reward.worker", "3"]
    run = subprocess.run(command, input=json.dumps([["5", SLOW]]) + "\n", capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGPROF
    assert run.stdout == "ready\n"


def test_graders_import_nothing_heavy():
    source = """
import sys
from meds_megatron.reward.grading import GraderPool
assert not {"torch", "sympy", "numpy", "ray"} & set(sys.modules), "driver"
from meds_megatron.reward.worker import judge
assert judge("x+1", "1+x")["correct"]
assert not {"torch", "ray", "transformers"} & set(sys.modules), "grader"
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=120)


def test_a_pool_needs_workers_and_time():
    with pytest.raises(ValueError, match="needs a worker"):
        GraderPool(workers=0, timeout_seconds=1)
    with pytest.raises(ValueError, match="needs a worker"):
        GraderPool(workers=1, timeout_seconds=0)


def test_graders_that_do_not_start_are_an_error_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GraderPool(workers=2, timeout_seconds=1) as pool:
        with pytest.raises(RuntimeError, match="do not start .exit code 1, 3 times in a row"):
            pool.grade([boxed("1+x"), boxed("2+x")], ["x", "x"])
        monkeypatch.undo()
        assert pool.grade([boxed("1+x")], ["x+1"])[0].correct
