r"""Plain comparison of answers, as normalised texts and as numbers, before math-verify is needed."""

import re

from meds_megatron.reward.notation import normalised, number, quantity

_NUMERAL = re.compile(r"([0-9A-Z]+)_\{?([0-9]+)\}?")
r"""A number in a base that is not ten, `52_8` or `4210_{5}`."""


def compare_plainly(answer: str, truth: str) -> bool | None:
    r"""True when the texts are equal or are the same number, False when they are different numbers, else None.

    Texts are compared as `normalised`. None leaves the verdict to math-verify. Different numbers are decided where both
    are whole numbers, or where one is in scientific notation, in any spelling (`4.5e33`, `4.5E33`, `4.5*10^33`,
    `4.5 \times 10^{33}`). Numbers in scientific notation are equal only if exactly equal as decimals, without a
    tolerance: math-verify's rounding to six decimals would make all small ones equal. A unit that only one of the two
    has is ignored; two that are spelled differently are left to math-verify, which ignores those in `\text{}`. The
    comparison takes microseconds.
    Numerals with a base (`52_8`) are equal only in digits and base.
    """
    plain_answer, plain_truth = normalised(answer), normalised(truth)
    if plain_answer == plain_truth:
        return bool(plain_truth)
    answer_number, truth_number = number(plain_answer), number(plain_truth)
    if answer_number is not None and truth_number is not None:
        if answer_number == truth_number:
            return True
        return False if answer_number.denominator == truth_number.denominator == 1 else None
    if (numeral := _NUMERAL.fullmatch(plain_answer)) and (truth_numeral := _NUMERAL.fullmatch(plain_truth)):
        return numeral.groups() == truth_numeral.groups()
    return _compare_quantities(answer, truth)


def answer_class(answer: str) -> str:
    """One text for all spellings of an answer that are the same as `normalised` or as one exact number."""
    plain = normalised(answer)
    value = number(plain)
    return plain if value is None else str(value)


def _compare_quantities(answer: str, truth: str) -> bool | None:
    """Verdict on numbers of which one at least is in scientific notation or has a unit, None for all other texts.

    Without scientific notation a unit of one letter may be a variable, as may any unit in the ground truth.
    """
    found, expected = quantity(answer), quantity(truth)
    if found is None or expected is None or (found.target and expected.target and found.target != expected.target):
        return None
    scientific = found.scientific or expected.scientific
    if found.value != expected.value:
        return False if scientific and found.certain and expected.certain else None
    if scientific:
        is_same = not found.unit or not expected.unit or found.unit == expected.unit
    else:
        is_same = bool(found.unit) and (found.unit == expected.unit or (not expected.unit and len(found.unit) > 1))
    return True if is_same else None
