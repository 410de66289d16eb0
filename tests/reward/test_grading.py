import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import pytest

from meds_megatron.data.problems import load_problems
from meds_megatron.reward import worker
from meds_megatron.reward.grading import Grade, GraderPool
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")

ROOT = Path(__file__).resolve().parents[2]

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


def processor_seconds(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wait_until(condition, seconds: float = HANG_SECONDS) -> bool:
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
def test_equal_answers_are_correct_in_any_form(pool, truth, answer, correct):
    assert pool.grade([boxed(answer)], [truth]) == [Grade(correct, "graded")]


def test_the_last_box_is_the_answer(pool):
    responses = ["first \\boxed{1}, better \\boxed{2}", "first \\boxed{2}, better \\boxed{1}"]
    assert [grade.correct for grade in pool.grade(responses, ["2", "2"])] == [True, False]


@pytest.mark.parametrize("response", ["", "the answer is 5", "cut off at \\boxed{5", "\\boxed{}", "\\boxed{ }"])
def test_response_without_a_boxed_answer_has_no_answer(pool, response):
    (grade,) = pool.grade([response], ["5"])
    assert (grade.correct, grade.outcome) == (False, "no_answer")


def test_no_responses_have_no_grades(pool):
    assert pool.grade([], []) == []


def test_each_response_needs_a_ground_truth(pool):
    with pytest.raises(ValueError, match="zip"):
        pool.grade(["\\boxed{1}"], [])


def test_ground_truth_that_is_not_mathematics_is_compared_as_text(pool):
    truth = "\\frac{"
    same, other = pool.grade([boxed("\\frac{ }"), boxed("x+1")], ["\\frac{}", truth])
    assert same.correct
    assert (other.correct, other.outcome) == (False, "graded")


def test_empty_ground_truth_is_an_error(pool):
    (grade,) = pool.grade([boxed("5")], ["$ $"])
    assert (grade.correct, grade.outcome) == (False, "error")
    assert "nothing to compare" in grade.detail


def test_too_long_ground_truth_is_an_error(pool):
    (grade,) = pool.grade([boxed("x")], ["1+" * 5000 + "1"])
    assert (grade.correct, grade.outcome) == (False, "error")


def test_long_and_non_ascii_answers_are_graded(pool):
    long = "x" + " + 1" * 450
    answers = [f"{long} + {n}" for n in range(4)] + ["é" * 1900]
    assert [grade.outcome for grade in pool.grade([boxed(answer) for answer in answers], [long] * 5)] == ["graded"] * 5


def test_too_long_answer_is_not_parsed(pool):
    (grade,) = pool.grade([boxed("1+" * 5000 + "1")], ["x"])
    assert (grade.correct, grade.outcome) == (False, "graded")
    assert "10001 characters" in grade.detail


def test_order_and_repeats_are_kept(pool):
    answers = ["x+1", "1+x", "x+2", "none", "x+1"] * 40
    responses = [boxed(answer) if answer != "none" else "?" for answer in answers]
    expected = [True, True, False, False, True] * 40
    assert [grade.correct for grade in pool.grade(responses, ["x+1"] * 200)] == expected


def test_every_real_answer_equals_itself(pool, shared_data):
    files = [str(shared_data / "data" / f"{name}.jsonl") for name in ("aime24", "amc23", "gsm8k_test", "math500")]
    answers = [problem.answer for problem in load_problems(files)]
    assert len(answers) == 1889
    assert all(grade.correct for grade in pool.grade([boxed(answer) for answer in answers], answers))
    # In braces no text equals the truth: math-verify and the check of what it accepts see each pair.
    in_braces = pool.grade([boxed(f"{{{answer}}}") for answer in answers], answers)
    assert sum(grade.correct for grade in in_braces) > 1800
    assert not [grade for grade in in_braces if grade.detail.startswith("math-verify accepts")]


def test_equal_pairs_are_judged_once():
    with GraderPool(workers=1, timeout_seconds=30) as pool:
        first = pool.submit(boxed("1+x"), "x+1")
        assert pool.submit("Or so: " + boxed(" 1+x "), "x+1") is first
        assert pool.submit(boxed("1+x"), "x+2") is not first
        assert first.result() == Grade(True, "graded")


def test_a_pair_whose_grading_failed_is_judged_again():
    with GraderPool(workers=1, timeout_seconds=3) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        (pid,) = pool.pids
        started = processor_seconds(pid)
        first = pool.submit(boxed(SLOW), "5")
        assert wait_until(lambda: processor_seconds(pid) > started + 0.2)
        os.kill(pid, signal.SIGKILL)
        assert first.result().outcome == "error"
        again = pool.submit(boxed(SLOW), "5")
        assert again is not first and again.result().outcome == "timeout"


def test_plain_comparisons_resolve_at_once_and_start_no_process():
    with GraderPool(workers=1, timeout_seconds=30) as pool:
        futures = [pool.submit(boxed("7"), "7"), pool.submit(boxed("8"), "7"), pool.submit("?", "7")]
        assert all(future.done() for future in futures)
        assert [future.result().outcome for future in futures] == ["graded", "graded", "no_answer"]
        assert pool.pids == []


def test_any_thread_may_submit(pool):
    with ThreadPoolExecutor(8) as threads:
        grades = threads.map(lambda n: pool.submit(boxed(f"{n % 7} + z"), "z + 3").result(), range(56))
    assert [grade.correct for grade in grades] == [n % 7 == 3 for n in range(56)]


def test_an_answer_that_takes_too_long_costs_only_itself():
    others = [f"x + {n}" for n in range(20)]
    with GraderPool(workers=1, timeout_seconds=1.5) as pool:
        answers = [*others[:7], SLOW, *others[7:]]
        grades = pool.grade([boxed(answer) for answer in answers], ["y"] * 7 + ["5"] + ["y"] * 13)
        assert [grade.outcome for grade in grades] == ["graded"] * 7 + ["timeout"] + ["graded"] * 13
        assert "in 1.5 seconds" in grades[7].detail
        assert pool.grade([boxed("1+x")], ["x+1"])[0].correct


def test_time_limit_is_processor_time():
    with GraderPool(workers=1, timeout_seconds=3) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        future = pool.submit(boxed("2+x"), "x+2")
        time.sleep(4)
        os.kill(pid, signal.SIGCONT)
        assert future.result() == Grade(True, "graded")
        assert pool.pids == [pid]


def test_time_limit_starts_anew_with_each_answer():
    with GraderPool(workers=1, timeout_seconds=0.5) as pool:
        begin = time.monotonic()
        pool.grade([boxed("1+x")], ["x+1"])
        (pid,) = pool.pids
        while processor_seconds(pid) < 2 and time.monotonic() - begin < 120:
            n = time.monotonic_ns()
            assert pool.grade([boxed(f"{n}+x")], [f"x+{n}"]) == [Grade(True, "graded")]
        assert pool.pids == [pid]


def test_a_stopped_grader_is_a_timeout_by_the_wall_clock():
    with GraderPool(workers=1, timeout_seconds=0.5) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        os.kill(pool.pids[0], signal.SIGSTOP)
        begin = time.monotonic()
        grades = pool.grade([boxed("1+y"), boxed("2+x")], ["y+1", "x+2"])
        assert time.monotonic() - begin > 4 * 0.5
        assert [grade.outcome for grade in grades] == ["timeout", "graded"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_grader_that_dies_is_replaced_and_its_answer_is_an_error(how):
    with GraderPool(workers=1, timeout_seconds=60) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        (pid,) = pool.pids
        started = processor_seconds(pid)
        futures = [pool.submit(boxed(answer), truth) for answer, truth in [(SLOW, "5"), ("1+y", "y+1"), ("2+y", "y+1")]]
        assert wait_until(lambda: processor_seconds(pid) > started + 0.2)
        os.kill(pid, how)
        grades = [future.result() for future in futures]
        assert [(grade.outcome, grade.correct) for grade in grades] == [
            ("error", False),
            ("graded", True),
            ("graded", False),
        ]
        assert f"exit code {-how}" in grades[0].detail
        assert pid not in pool.pids and len(pool.pids) == 1


def test_a_grader_that_died_while_idle_costs_no_answer():
    with GraderPool(workers=1, timeout_seconds=60) as pool:
        pool.grade([boxed("1+x")], ["x+1"])
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        assert wait_until(lambda: not is_running(pid))
        assert pool.grade([boxed("1+y")], ["y+1"]) == [Grade(True, "graded")]


class StartedGraders(GraderPool):
    """A pool that knows which of its graders have started: kills of one that starts count toward its failed starts."""

    def __init__(self):
        super().__init__(workers=2, timeout_seconds=60)
        self._started = set()

    def _start(self):
        process = super()._start()
        self._started.add(process.pid)
        return process

    @property
    def started(self) -> list[int]:
        return [pid for pid in self.pids if pid in self._started]


def test_graders_killed_at_any_moment_cost_one_answer_each():
    with StartedGraders() as pool:
        futures = [pool.submit(boxed(f"x + {n}"), "y") for n in range(300)]
        kills = 0
        for n in range(10, 300, 29):
            futures[n].result()
            assert wait_until(lambda: pool.started)
            started = pool.started
            os.kill(started[kills % len(started)], signal.SIGKILL)
            kills += 1
        outcomes = [future.result().outcome for future in futures]
    assert set(outcomes) <= {"graded", "error"}
    assert kills == 10 and outcomes.count("error") <= kills


@pytest.fixture
def patched_worker(tmp_path, monkeypatch):
    """Makes pools start graders that run `source` before the comparison of an answer with `lost` in it."""

    def patch(source: str) -> None:
        program = tmp_path / "worker.py"
        program.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import math_verify
from meds_megatron.data.problems import load_problems
from meds_megatron.reward import worker
real = math_verify.verify
def verify(gold, answer, **settings):
    if "lost" in str(answer):
        {source}
    return real(gold, answer, **settings)
math_verify.verify = verify
worker.main(*map(int, sys.argv[1:4]), *sys.argv[4:])
""")
        monkeypatch.setattr(worker, "__file__", str(program))

    return patch


@pytest.mark.parametrize(
    ("source", "detail", "replaced"),
    [
        ("raise KeyError('lost')", "KeyError: 'lost'", False),
        ("raise KeyError('x' * 5000)", "KeyError: '" + "x" * 189, False),
        ("hoard = [bytes(1 << 28) for _ in range(64)]", "MemoryError: more than 1.5 GiB for '\\\\text{lost}'", True),
        ("os._exit(7)", "the grader process ended with exit code 7 on '\\\\text{lost}'", True),
    ],
)
def test_a_comparison_that_fails_is_an_error_with_its_reason(patched_worker, source, detail, replaced):
    patched_worker(source)
    with GraderPool(workers=1, timeout_seconds=60, memory_gib=1.5) as pool:
        pool.grade([boxed("1+y")], ["y+1"])
        before = pool.pids
        lost, other = pool.grade([boxed("\\text{lost}"), boxed("1 + x")], ["x", "x + 1"])
        assert lost == Grade(False, "error", detail)
        assert other == Grade(True, "graded")
        assert (pool.pids != before) == replaced


def test_what_a_library_prints_does_not_mix_with_verdicts(patched_worker):
    patched_worker("print('[true, \"graded\", \"\"]', flush=True); os.write(1, b'noise')")
    with GraderPool(workers=1, timeout_seconds=60) as pool:
        assert pool.grade([boxed("\\text{lost}")], ["x"]) == [Grade(False, "graded")]


def test_closing_leaves_no_process_and_no_waiting_future():
    with GraderPool(workers=2, timeout_seconds=60) as pool:
        pool.grade([boxed("1+x"), boxed("2+x")], ["x", "x"])
        pids = pool.pids
        assert len(pids) == 2
        futures = [pool.submit(boxed(f"{n} + {SLOW}"), "5") for n in range(5)]
        time.sleep(0.3)
    assert not any(is_running(pid) for pid in pids)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(timeout=0)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(boxed("1+x"), "x+1")


def test_closing_while_graders_start_leaves_no_process():
    for delay in (0, 0.01, 0.05, 0.2):
        begin = time.monotonic()
        with GraderPool(workers=2, timeout_seconds=60) as pool:
            futures = [pool.submit(boxed(f"{n} + {SLOW}"), "5") for n in range(2)]
            time.sleep(delay)
        assert time.monotonic() - begin < 30
        assert not any(is_running(pid) for pid in pool.pids)
        assert all(future.cancelled() or isinstance(future.exception(), CancelledError) for future in futures)


DRIVER = f"""
import signal, sys, time
from meds_megatron.reward.grading import GraderPool
# A shell without job control starts background commands with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
SLOW = "\\\\boxed{{" + {SLOW!r} + "}}"
pool = GraderPool(workers=1, timeout_seconds=600)
assert pool.grade(["\\\\boxed{{1+x}}"], ["x+1"])[0].correct
print(pool.pids[0], flush=True)
"""


def start_driver(last: str) -> tuple[subprocess.Popen, int]:
    """A driver in a process group of its own that runs `last` after grading an answer, and its grader's process id."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER + last],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        process_group=0,
    )
    grader = int(driver.stdout.readline())
    assert is_running(grader)
    return driver, grader


BUSY = 'pool.submit(SLOW, "5"); print("busy", flush=True); time.sleep(600)'


@pytest.mark.parametrize(
    ("how", "last"),
    [
        (signal.SIGKILL, 'print("idle", flush=True); time.sleep(600)'),
        (signal.SIGKILL, BUSY),
        (signal.SIGTERM, BUSY),
        (signal.SIGINT, 'print("busy", flush=True); pool.grade([SLOW], ["5"])'),
        (signal.SIGINT, "with pool: " + BUSY),
    ],
)
def test_no_grader_outlives_its_parent(how, last):
    driver, grader = start_driver(last)
    driver.stdout.readline()
    time.sleep(0.3)
    assert is_running(grader)
    driver.send_signal(how)
    driver.communicate(timeout=HANG_SECONDS)
    assert wait_until(lambda: not is_running(grader))


def test_ctrl_c_in_the_terminal_prints_the_drivers_traceback_only():
    driver, grader = start_driver('print("busy", flush=True); pool.grade([SLOW], ["5"])')
    driver.stdout.readline()
    time.sleep(0.3)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=HANG_SECONDS)
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    assert wait_until(lambda: not is_running(grader))


def test_a_grader_whose_parent_is_gone_before_it_starts_ends_at_once():
    command = [sys.executable, "-P", worker.__file__, "0", str(os.getppid()), str(2**30)]
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", ["script", "module", "after Ray"])
def test_graders_do_not_import_the_drivers_main_module(tmp_path, kind):
    main = """
print("main module runs", flush=True)
from meds_megatron.reward.grading import GraderPool
with GraderPool(workers=2, timeout_seconds=60) as pool:
    print(pool.grade(["\\\\boxed{1+x}", "\\\\boxed{2+x}"], ["x+1", "x+1"]), flush=True)
"""
    if kind == "after Ray":
        main = "import ray\nray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)" + main
    (tmp_path / "unguarded.py").write_text(main)
    command = ["-m", "unguarded"] if kind == "module" else [str(tmp_path / "unguarded.py")]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    run = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=HANG_SECONDS)
    grades = [Grade(True, "graded"), Grade(False, "graded")]
    assert (run.returncode, run.stdout) == (0, f"main module runs\n{grades}\n"), run.stderr


def test_graders_import_nothing_heavy():
    source = """
import sys
from meds_megatron.reward.grading import GraderPool
assert not {"torch", "sympy", "numpy", "ray"} & set(sys.modules), "driver"
from meds_megatron.reward.worker import judge
assert judge("1+x", "x+1") == (True, "")
assert not {"torch", "ray", "transformers"} & set(sys.modules), "grader"
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=HANG_SECONDS)


def test_a_pool_needs_workers_and_time():
    with pytest.raises(ValueError, match="workers >= 1 and timeout_seconds > 0, not 0 and 1"):
        GraderPool(workers=0, timeout_seconds=1)
    with pytest.raises(ValueError, match="workers >= 1 and timeout_seconds > 0, not 1 and 0"):
        GraderPool(workers=1, timeout_seconds=0)


def test_graders_that_do_not_start_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GraderPool(workers=2, timeout_seconds=1) as pool:
        future = pool.submit(boxed("3+x"), "x")
        with pytest.raises(RuntimeError, match=r"do not start, 3 times in a row: .* exit code 1 on"):
            future.result()
        monkeypatch.undo()
        assert pool.grade([boxed("1+x")], ["x+1"])[0].correct
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with GraderPool(workers=2, timeout_seconds=1) as pool:
        with pytest.raises(RuntimeError, match=r"do not start, 3 times in a row: .* exit code 1 on"):
            pool.grade([boxed(f"{n}+x") for n in range(1000)], ["x"] * 1000)
        assert pool.pids == []


def test_missing_math_verify_is_named(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    source = Path(worker.__file__).read_text()
    program.write_text(source.replace("from math_verify import", "from math_verify_that_is_missing import"))
    monkeypatch.setattr(worker, "__file__", str(program))
    message = "do not start.*No module named 'math_verify_that_is_missing'"
    with GraderPool(workers=1, timeout_seconds=1) as pool, pytest.raises(RuntimeError, match=message):
        pool.grade([boxed("1+x")], ["x+1"])
