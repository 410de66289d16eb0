import pytest

from meds_megatron.latex import last_boxed
from meds_megatron.reward.answers import compare_plainly


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("42", "42"),
        (" 42. ", "42"),
        ("42.0", "42"),
        ("+42", "42"),
        ("\u22125", "-5"),
        ("$18$", "18"),
        ("\\$18", "18"),
        ("1,234", "1234"),
        ("11,\\!111,\\!100", "11111100"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("-\\tfrac{6}{4}", "-3/2"),
        ("\\frac{-3}{2}", "-1.5"),
        ("50 \\%", "50\\%"),
        ("\\text{Evelyn}", "Evelyn"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("x  +\n1", "x+1"),
    ],
)
def test_equal_texts_and_numbers_are_decided_plainly(answer, truth):
    assert compare_plainly(answer, truth) is True
    assert compare_plainly(truth, answer) is True


@pytest.mark.parametrize(("answer", "truth"), [("41", "42"), ("42.0", "43"), ("1,234", "1,235"), ("6/3", "3")])
def test_different_whole_numbers_are_decided_plainly(answer, truth):
    assert compare_plainly(answer, truth) is False


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("1 2", "12"),
        ("x", "y"),
        ("0.333333", "1/3"),
        ("1/0", "1"),
        ("3^2", "9"),
        ("9" * 5000, "1"),
        ("1,2", "12"),
        ("", "1"),
    ],
)
def test_comparisons_that_need_math_verify_are_undecided(answer, truth):
    assert compare_plainly(answer, truth) is None


def test_empty_answers_are_not_equal():
    assert compare_plainly("$ $", "") is False


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("no box", None),
        ("\\boxed{5}", "5"),
        ("\\boxed {5}", "5"),
        ("\\boxed\n{5}", "5"),
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\boxed{x = \\boxed{3}}", "3"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{a \\\\}", "a \\\\"),
        ("\\boxed{1} then \\boxed{2", None),
        ("\\boxed{1} then \\boxed 2", "1"),
        ("\\boxed{1}, so \\boxed", "1"),
        ("\\boxed{}", ""),
        ("ответ \\boxed{ответ}", "ответ"),
        ("boxed{5}", None),
    ],
)
def test_last_boxed(text, box):
    assert last_boxed(text) == box
