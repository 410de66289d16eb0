r"""The rules by which answers are compared with ground truths, by the names of `reward.grader`.

`math_verify` accepts any form of the same value. `strict` accepts the same text, LaTeX spacing and fonts aside, and the
same number in another spelling; it needs no mathematics, and rejects `\frac{2}{4}` for `x = \frac{1}{2}`. `limo` gives
the verdicts of LIMO's evaluation (`reward.limo`), with their known false accepts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from meds_megatron.latex import last_boxed
from meds_megatron.reward import limo
from meds_megatron.reward.answers import compare_plainly
from meds_megatron.reward.notation import for_math_verify


@dataclass(frozen=True)
class Rules:
    """One way to grade."""

    extract: Callable[[str], str | None]
    """The answer in a response; None or an empty text if there is none."""
    compare: Callable[[str, str], bool | None]
    """Verdict on (answer, truth) that takes no mathematics; None leaves it to a grader process."""
    spell: Callable[[str], str] = str
    """Text as the grader process reads it."""
    slow_is_wrong: bool = False
    """An answer that takes too long is wrong, instead of neither right nor wrong."""


def compare_strictly(answer: str, truth: str) -> bool:
    """Whether two texts are equal, or the same number, without mathematics."""
    return compare_plainly(answer, truth) is True


def _compare_texts(answer: str, truth: str) -> bool | None:
    return True if answer == truth else None


RULES = {
    "math_verify": Rules(last_boxed, compare_plainly, for_math_verify),
    "strict": Rules(last_boxed, compare_strictly),
    "limo": Rules(limo.extract, _compare_texts, slow_is_wrong=True),
}
