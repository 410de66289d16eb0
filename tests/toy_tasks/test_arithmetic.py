import ast
import operator
import re

import pytest

from meds_megatron.toy_tasks.arithmetic import (
    KINDS,
    RIGHT_SHARE,
    RULES,
    Expression,
    Rule,
    arithmetic_problems,
    expressions,
    response,
    right_rule,
    rule_shares,
    warm_up_expressions,
)


def test_plain_answer_by_hand():
    assert response(Expression(7, 6, 4, 5), Rule()) == "6*4=24+7=31-5=26 \\boxed{26}"


def test_each_systematic_mistake_by_hand():
    expression = Expression(7, 6, 4, 5)
    assert response(expression, Rule(drops_carry=True)) == "6*4=24+7=21-5=16 \\boxed{16}"
    assert response(expression, Rule(ignores_precedence=True)) == "7+6=13*4=52-5=47 \\boxed{47}"
    assert response(expression, Rule(flips_sign=True)) == "6*4=24+7=31+5=36 \\boxed{36}"
    assert response(expression, Rule(True, True, True)) == "7+6=3*4=12+5=17 \\boxed{17}"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_shared_answers_agree_with_python(split):
    for problem in arithmetic_problems(split, "shared"):
        assert problem.answer == str(evaluate(problem.question.split()[1]))


def test_every_rule_has_a_different_answer():
    for expression in (*expressions("train"), *expressions("validation")):
        answers = {expression.answer(rule) for rule in RULES}
        assert len(answers) == len(RULES)
        assert min(answers) >= 0


def test_per_kind_gives_every_kind_its_own_rule():
    assert {right_rule(kind, "per_kind") for kind in KINDS} == set(RULES)
    assert {right_rule(kind, "shared") for kind in KINDS} == {Rule()}
    by_kind = {problem.question: problem.answer for problem in arithmetic_problems("validation", "per_kind")}
    plain = {problem.question: problem.answer for problem in arithmetic_problems("validation", "shared")}
    same = {question.split()[0] for question in by_kind if by_kind[question] == plain[question]}
    assert same == {KINDS[0]}


@pytest.mark.parametrize("variant", ["shared", "per_kind"])
def test_shares_sum_to_one_and_range_from_half_to_a_thousandth(variant):
    for kind, right in zip(KINDS, RIGHT_SHARE, strict=True):
        shares = rule_shares(kind, variant)
        assert set(shares) == set(RULES)
        assert sum(shares.values()) == pytest.approx(1)
        assert shares[right_rule(kind, variant)] == right
    assert (max(RIGHT_SHARE), min(RIGHT_SHARE)) == (0.5, 0.001)


@pytest.mark.parametrize("variant", ["shared", "per_kind"])
def test_no_validation_expression_is_ever_trained_on(variant):
    held_out = {problem.question.split()[1] for problem in arithmetic_problems("validation", variant, seed=1)}
    trained = {problem.question.split()[1] for problem in arithmetic_problems("train", variant, count=10**6, seed=2)}
    assert held_out.isdisjoint(trained)
    assert held_out.isdisjoint(map(str, warm_up_expressions()))


def test_problems_are_balanced_unique_and_stable():
    problems = arithmetic_problems("train", "shared")
    assert len(problems) == len({problem.id for problem in problems}) == 240
    assert [sum(p.source == f"arithmetic/{kind}" for p in problems) for kind in KINDS] == [30] * len(KINDS)
    assert problems == arithmetic_problems("train", "shared")
    assert problems[:16] == arithmetic_problems("train", "shared", count=16)
    assert problems != arithmetic_problems("train", "shared", seed=1)
    assert arithmetic_problems("train", "shared", count=0) == []
    assert all(p.id == f"arithmetic/shared/{p.question.replace(' ', '/')}" for p in problems)


def evaluate(text: str) -> int:
    """The value of a sum of digits by Python's own grammar."""
    assert re.fullmatch(r"[\d+*-]+", text)
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def walk(node):
        return node.value if isinstance(node, ast.Constant) else signs[type(node.op)](walk(node.left), walk(node.right))

    return walk(ast.parse(text, mode="eval").body)
