"""All graders on the answers of the real data sets and on perturbed ones."""

import re

import pytest

from meds_megatron.data.problems import load_problems
from meds_megatron.reward import limo
from meds_megatron.reward.grading import Grade, GraderPool
from meds_megatron.reward.rules import RULES
from tests.reward.perturbed_answers import LIMO_ACCEPTS, LIMO_REJECTS, PERTURBED

pytestmark = pytest.mark.usefixtures("processes")

CASES = [
    (truth, answer, right)
    for truth, (rights, wrongs) in PERTURBED.items()
    for right, answers in ((True, rights), (False, wrongs))
    for answer in answers
]
DATA_SETS = ("aime24", "amc23", "math500", "gsm8k_test", "gsm8k_train")


@pytest.fixture(scope="module", params=RULES)
def pool(request):
    with GraderPool(workers=2, timeout_seconds=30, grader=request.param) as pool:
        yield pool


def boxed(answer: str) -> str:
    return f"So the answer is $\\boxed{{{answer}}}$."


def test_every_real_answer_equals_itself(pool, shared_data):
    """Without exceptions, by any grader."""
    problems = load_problems([str(shared_data / "data" / f"{name}.jsonl") for name in DATA_SETS])
    answers = [problem.answer for problem in problems]
    assert len(answers) == 30 + 40 + 500 + 1319 + 7473
    grades = pool.grade([boxed(answer) for answer in answers], answers)
    assert [(p.id, grade) for p, grade in zip(problems, grades, strict=True) if not grade.correct] == []


def test_perturbed_answers_are_graded_as_a_person_does(pool):
    """The default grader without exceptions, `strict` without false accepts, `limo` with those of LIMO's own code."""
    assert len(CASES) > 400
    grades = pool.grade([boxed(answer) for _, answer, _ in CASES], [truth for truth, _, _ in CASES])
    assert {grade.outcome for grade in grades} == {"graded"}
    accepted = {(truth, answer) for (truth, answer, right), g in zip(CASES, grades, strict=True) if g.correct > right}
    rejected = {(truth, answer) for (truth, answer, right), g in zip(CASES, grades, strict=True) if g.correct < right}
    if pool.grader == "strict":
        assert accepted == set() and len(rejected) < 150
    else:
        expected = {"math_verify": (set(), set()), "limo": (LIMO_ACCEPTS, LIMO_REJECTS)}[pool.grader]
        assert (accepted, rejected) == expected


def test_strict_is_decided_without_a_process():
    with GraderPool(workers=1, timeout_seconds=30, grader="strict") as pool:
        grades = pool.grade([boxed(answer) for answer in ("0.5", r"\dfrac12", "x+1", "?")], [r"\frac{1}{2}"] * 4)
        assert [grade.correct for grade in grades] == [True, True, False, False] and pool.pids == []


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"cut off at \boxed{\frac{1", r"\frac{1"),
        (r"it is \boxed 5$ and so on", "5"),
        ("\\boxed{a\n   b.}", "ab"),
        ("the answer is 5", ""),
        ("", ""),
    ],
)
def test_limo_takes_the_answer_from_the_last_box_closed_or_not(response, answer):
    assert limo.extract(response) == answer


def test_without_a_box_there_is_no_answer(pool):
    (grade,) = pool.grade(["the answer is 5"], ["5"])
    assert (grade.correct, grade.outcome) == (False, "no_answer")


def test_limo_counts_a_comparison_that_takes_too_long_as_wrong():
    slow = r"\prod_{k=1}^{10000000} k"
    with GraderPool(workers=1, timeout_seconds=2, grader="limo") as pool:
        assert pool.grade([boxed(slow)], ["5"]) == [Grade(False, "graded", f"no verdict on {slow!r} in 2 seconds")]


@pytest.mark.parametrize("answer", ["__import__('os').mkdir('{}')", "exec(chr(49))", "open('{}','w')", "().__class__"])
def test_limo_never_runs_an_answer_as_python(answer, tmp_path):
    target = tmp_path / "made"
    answer = answer.format(target)
    with pytest.raises(ValueError, match=re.escape(answer)):
        limo._parse_arithmetic(answer)
    assert not limo.symbolically_equal(answer, "5")
    assert not target.exists()
