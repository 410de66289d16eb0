"""The second toy task: arithmetic whose last step hides the systematic mistake, or splits it.

Kinds, expressions and rules are those of `toy_tasks.arithmetic`, with a different correct rule for each kind
(`per_kind`). The working ends in a remainder: `6*4=24+7=31-5=26%9=8 \\boxed{8}`. The correct divisor is DIVISOR.
Warm-up answers under a wrong rule take SLIP instead in half of the cases, so that one mistake gives two answers; and
different mistakes leave the same remainder, so that one answer comes from several. Mistakes by answer and mistakes by
rule (`arithmetic.rule_of`) are therefore two different partitions, while no wrong rule ever gives the right answer.
"""

import random
from functools import cache

from meds_megatron.data.problems import Problem
from meds_megatron.toy_tasks.arithmetic import (
    DEFAULT_COUNT,
    KINDS,
    RULES,
    Expression,
    Rule,
    Split,
    question,
    right_rule,
)
from meds_megatron.toy_tasks.arithmetic import expressions as distinct_expressions

DIVISOR = 9
SLIP = 8
SLIP_SHARE = 0.5
"""Share of the warm-up answers under a wrong rule that divide by SLIP."""


def response(expression: Expression, rule: Rule, divisor: int = DIVISOR) -> str:
    """A worked answer under `rule` that ends in the remainder by `divisor`."""
    working, result = expression.work(rule)
    return f"{working}%{divisor}={result % divisor} \\boxed{{{result % divisor}}}"


def warm_up_response(kind: str, expression: Expression, rule: Rule, rng: random.Random) -> str:
    """A worked answer as the warm-up shows it: under a wrong rule the divisor may be SLIP."""
    slips = rule != right_rule(kind, "remainder") and rng.random() < SLIP_SHARE
    return response(expression, rule, SLIP if slips else DIVISOR)


@cache
def expressions(split: Split, kind: str) -> tuple[Expression, ...]:
    """The expressions of a split that suit the kind, in a fixed order: no wrong rule leaves the right remainder by
    either divisor, and at least two leave the same one."""
    right = right_rule(kind, "remainder")
    return tuple(e for e in distinct_expressions(split) if _hides_and_splits(e, right))


def _hides_and_splits(expression: Expression, right: Rule) -> bool:
    wrong = [expression.answer(rule) for rule in RULES if rule != right]
    by_divisor = {result % DIVISOR for result in wrong}
    answers = by_divisor | {result % SLIP for result in wrong}
    return expression.answer(right) % DIVISOR not in answers and len(by_divisor) < len(wrong)


def remainder_problems(split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a split, kinds in turn; the same ones for the same arguments.

    Every kind has as many problems as the one with the fewest expressions; a count above that gives all of them. The
    default count is that of the first task.
    """
    rng = random.Random(f"remainder {split} {seed}")
    per_kind = [rng.sample(expressions(split, kind), len(expressions(split, kind))) for kind in KINDS]
    pairs = [pair for row in zip(*per_kind, strict=False) for pair in zip(KINDS, row, strict=True)]
    wanted = DEFAULT_COUNT[split] if count is None else count
    return [_problem(kind, expression) for kind, expression in pairs[:wanted]]


def _problem(kind: str, expression: Expression) -> Problem:
    answer = str(expression.answer(right_rule(kind, "remainder")) % DIVISOR)
    identity = f"arithmetic/remainder/{kind}/{expression}"
    return Problem(id=identity, question=question(kind, expression), answer=answer, source=f"arithmetic/{kind}")
