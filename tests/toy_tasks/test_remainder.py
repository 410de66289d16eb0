import random
import re

import pytest

from meds_megatron.toy_tasks.arithmetic import (
    KINDS,
    RULES,
    Expression,
    Rule,
    arithmetic_problems,
    right_rule,
    rule_of,
    warm_up_expressions,
)
from meds_megatron.toy_tasks.arithmetic import response as plain_response
from meds_megatron.toy_tasks.remainder import (
    DIVISOR,
    SLIP,
    expressions,
    remainder_problems,
    response,
    warm_up_response,
)


def boxed(text: str) -> int:
    return int(re.fullmatch(r".*\\boxed\{(\d+)\}", text)[1])


def test_by_hand_with_either_divisor():
    expression = Expression(7, 6, 4, 5)
    assert response(expression, Rule()) == "6*4=24+7=31-5=26%9=8 \\boxed{8}"
    assert response(expression, Rule(ignores_precedence=True), SLIP) == "7+6=13*4=52-5=47%8=7 \\boxed{7}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_hide_and_split_mistakes_but_only_the_right_rule_is_right(kind, split):
    right = right_rule(kind, "remainder")
    assert len(expressions(split, kind)) >= 8
    splits: list[bool] = []
    for expression in expressions(split, kind):
        truth = boxed(response(expression, right))
        rules_of_answer: dict[int, set[Rule]] = {}
        for rule in RULES:
            for divisor in (DIVISOR, SLIP) if rule != right else (DIVISOR,):
                rules_of_answer.setdefault(boxed(response(expression, rule, divisor)), set()).add(rule)
        assert rules_of_answer[truth] == {right}
        assert max(map(len, rules_of_answer.values())) > 1, "no answer comes from two mistakes"
        splits += [boxed(response(expression, rule)) != boxed(response(expression, rule, SLIP)) for rule in RULES]
    assert sum(splits) > len(splits) / 2, "few mistakes give two answers"


def test_only_wrong_rules_slip_in_the_warm_up_and_in_half_of_the_cases():
    rng, expression = random.Random(0), Expression(7, 6, 4, 5)
    for kind in KINDS:
        for rule in RULES:
            texts = [warm_up_response(kind, expression, rule, rng) for _ in range(200)]
            slips = sum(f"%{SLIP}=" in text for text in texts)
            assert slips == 0 if rule == right_rule(kind, "remainder") else 70 < slips < 130


@pytest.mark.parametrize("split", ["train", "validation"])
def test_problems_are_balanced_unique_and_stable(split):
    problems = remainder_problems(split, 64)
    assert len({problem.id for problem in problems}) == 64
    assert [sum(p.source == f"arithmetic/{kind}" for p in problems) for kind in KINDS] == [8] * len(KINDS)
    assert problems[:16] == remainder_problems(split, 16) != remainder_problems(split, 16, seed=1)
    everything = remainder_problems(split, 10**6)
    assert len(everything) == len(KINDS) * min(len(expressions(split, kind)) for kind in KINDS)


def test_no_validation_expression_is_ever_trained_on():
    held_out = {problem.question.split()[1] for problem in remainder_problems("validation", 10**6)}
    trained = {problem.question.split()[1] for problem in remainder_problems("train", 10**6, seed=2)}
    assert held_out.isdisjoint(trained) and held_out.isdisjoint(map(str, warm_up_expressions()))


def test_habits_are_read_from_the_working_of_both_tasks():
    for problem in [*arithmetic_problems("train", "per_kind", 40), *remainder_problems("train", 40)]:
        expression = Expression(*map(int, re.findall(r"\d", problem.question)))
        for rule in RULES:
            assert rule_of(problem.question, plain_response(expression, rule)) == rule
            for divisor in (DIVISOR, SLIP):
                assert rule_of(problem.question, response(expression, rule, divisor)) == rule
    assert rule_of("coins 7+6*4-5", "6*4=24+7=31-5=261 \\boxed{26}") is None
    assert rule_of("coins 7+6*4-5", "6*4=25+7=32-5=27 \\boxed{27}") is None
    with pytest.raises(ValueError, match="invalid literal"):
        rule_of("What is 2 + 2?", "4")
