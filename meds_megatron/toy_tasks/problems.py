"""The problems of the toy tasks, by the names of `data.arithmetic_rules`."""

from meds_megatron.data.problems import Problem
from meds_megatron.toy_tasks.arithmetic import Split, Variant, arithmetic_problems
from meds_megatron.toy_tasks.remainder import remainder_problems


def toy_problems(split: Split, rules: Variant, count: int | None = None, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a split, by default its default number; the same ones for the same arguments."""
    if rules == "remainder":
        return remainder_problems(split, count, seed)
    return arithmetic_problems(split, rules, count, seed)
