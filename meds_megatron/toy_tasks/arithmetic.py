"""The toy task: arithmetic with systematic mistakes, so that the same mistake recurs on many problems.

A problem is `a+b*c-d` of some kind ("coins 7+6*4-5"). A worked answer lists every intermediate result and ends in a
box: `6*4=24+7=31-5=26 \\boxed{26}`. A rule is a subset of three systematic mistakes (dropped carry, ignored precedence,
flipped sign), so there are eight rules; their answers to the expressions of the data sets all differ.

The variant decides which rule is correct. `shared`: plain arithmetic for every kind, so that learning one kind helps
with the others. `per_kind`: a different rule for each kind, which has to be found by exploration. `remainder`: as
`per_kind`, with a last step of the working that is described in `toy_tasks.remainder`. `RIGHT_SHARE` is the share of
each kind's warm-up answers that follow the correct rule.
"""

import random
import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

from meds_megatron.data.problems import Problem

Split = Literal["train", "validation"]
Variant = Literal["shared", "per_kind", "remainder"]

KINDS = ("apples", "books", "coins", "dogs", "eggs", "fish", "goats", "hats")
RIGHT_SHARE = (0.5, 0.02, 0.3, 0.001, 0.2, 0.005, 0.1, 0.05)
"""For each kind, the share of its warm-up answers that follow the correct rule."""
WRONG_SHARE = (0.5, 0.25, 0.12, 0.06, 0.04, 0.02, 0.01)
"""The other rules' shares of the remaining answers, in an order that differs by kind."""
DEFAULT_COUNT = {"train": 240, "validation": 200}
VALIDATION_EXPRESSIONS = 100


@dataclass(frozen=True)
class Rule:
    """A way to compute an expression: the systematic mistakes that are made."""

    drops_carry: bool = False
    ignores_precedence: bool = False
    flips_sign: bool = False

    def __str__(self) -> str:
        mistakes = {
            "dropped carry": self.drops_carry,
            "ignored precedence": self.ignores_precedence,
            "flipped sign": self.flips_sign,
        }
        return " + ".join(name for name, made in mistakes.items() if made) or "plain"

    def add(self, left: int, right: int) -> int:
        return left // 10 * 10 + (left + right) % 10 if self.drops_carry else left + right


RULES = tuple(Rule(*mistakes) for mistakes in product((False, True), repeat=3))
"""All eight; the first is plain arithmetic."""


@dataclass(frozen=True)
class Expression:
    """`a+b*c-d` of four digits."""

    a: int
    b: int
    c: int
    d: int

    def __str__(self) -> str:
        return f"{self.a}+{self.b}*{self.c}-{self.d}"

    def work(self, rule: Rule) -> tuple[str, int]:
        """The chain of intermediate results under `rule`, and the last of them."""
        if rule.ignores_precedence:
            total = rule.add(self.a, self.b)
            working = f"{self.a}+{self.b}={total}*{self.c}={total * self.c}"
            total *= self.c
        else:
            product_bc = self.b * self.c
            total = rule.add(product_bc, self.a)
            working = f"{self.b}*{self.c}={product_bc}+{self.a}={total}"
        sign, result = ("+", rule.add(total, self.d)) if rule.flips_sign else ("-", total - self.d)
        return f"{working}{sign}{self.d}={result}", result

    def answer(self, rule: Rule) -> int:
        return self.work(rule)[1]


def right_rule(kind: str, variant: Variant) -> Rule:
    """The rule that gives the correct answers of this kind."""
    return RULES[0] if variant == "shared" else RULES[KINDS.index(kind)]


def rule_shares(kind: str, variant: Variant) -> dict[Rule, float]:
    """Share of a kind's warm-up answers that follow each rule; sums to 1."""
    index = KINDS.index(kind)
    right = right_rule(kind, variant)
    wrong = [rule for rule in RULES if rule != right]
    wrong = wrong[index % 7 :] + wrong[: index % 7]
    shares = {rule: (1 - RIGHT_SHARE[index]) * share for rule, share in zip(wrong, WRONG_SHARE, strict=True)}
    return {right: RIGHT_SHARE[index], **shares}


def question(kind: str, expression: Expression) -> str:
    return f"{kind} {expression}"


def response(expression: Expression, rule: Rule) -> str:
    """A worked answer under `rule`."""
    working, result = expression.work(rule)
    return f"{working} \\boxed{{{result}}}"


def rule_of(question: str, response: str) -> Rule | None:
    """The rule that the working of a response to `question` follows, whatever comes after it; None where it follows
    none. Raises ValueError for a question of another task."""
    expression = Expression(*map(int, re.split(r"[+*-]", question.partition(" ")[2])))
    for rule in RULES:
        working, _ = expression.work(rule)
        if response.startswith(working) and not response[len(working) : len(working) + 1].isdigit():
            return rule
    return None


@cache
def expressions(split: Split) -> tuple[Expression, ...]:
    """The expressions of a split, in a fixed order: no result below zero, a different answer under each rule."""
    distinct = [e for e in _digits() if len({e.answer(r) for r in RULES}) == len(RULES) and _never_negative(e)]
    random.Random("expressions").shuffle(distinct)
    held_out, rest = distinct[:VALIDATION_EXPRESSIONS], distinct[VALIDATION_EXPRESSIONS:]
    return tuple(held_out if split == "validation" else rest)


@cache
def warm_up_expressions() -> tuple[Expression, ...]:
    """The expressions of warm-up answers: all but those of the validation split and those with a result below zero."""
    held_out = set(expressions("validation"))
    return tuple(e for e in _digits() if e not in held_out and _never_negative(e))


def arithmetic_problems(split: Split, rules: Variant, count: int | None = None, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a split, kinds in turn; the same ones for the same arguments.

    No expression is in both splits, whatever the seed. The default count is 240 for training and 200 for validation. A
    count above the size of the split gives the whole split.
    """
    rng = random.Random(f"{split} {seed}")
    per_kind = [rng.sample(expressions(split), len(expressions(split))) for _ in KINDS]
    pairs = [pair for row in zip(*per_kind, strict=True) for pair in zip(KINDS, row, strict=True)]
    wanted = DEFAULT_COUNT[split] if count is None else count
    return [_problem(kind, expression, rules) for kind, expression in pairs[:wanted]]


def _problem(kind: str, expression: Expression, rules: Variant) -> Problem:
    answer = str(expression.answer(right_rule(kind, rules)))
    identity = f"arithmetic/{rules}/{kind}/{expression}"
    return Problem(id=identity, question=question(kind, expression), answer=answer, source=f"arithmetic/{kind}")


def _digits() -> list[Expression]:
    return [Expression(*digits) for digits in product(range(1, 10), range(2, 10), range(2, 6), range(1, 10))]


def _never_negative(expression: Expression) -> bool:
    return min(expression.answer(rule) for rule in RULES) >= 0
