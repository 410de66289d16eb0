"""Letters that differ in case are different variables where both are in one expression."""

import pytest

from meds_megatron.reward.answers import answer_class, compare_plainly
from meds_megatron.reward.differences import surely_different
from meds_megatron.reward.rules import RULES


@pytest.mark.parametrize(
    ("answer", "truth"), [("r - R", "R - r"), ("N(n+1)", "n(N+1)"), ("\\frac{a}{A}", "\\frac{A}{a}")]
)
def test_exchanged_letters_are_another_answer(answer: str, truth: str) -> None:
    assert compare_plainly(answer, truth) is None
    assert answer_class(answer) != answer_class(truth)
    assert RULES["strict"].compare(answer, truth) is False
    rules = RULES["math_verify"]
    assert surely_different(rules.spell(answer), rules.spell(truth))
