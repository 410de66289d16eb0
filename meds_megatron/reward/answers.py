r"""Plain comparison of answers, as normalised texts and as numbers, before math-verify is needed."""

import re
from fractions import Fraction

MAX_NUMBER_CHARACTERS = 64

_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-"})
_REMOVED = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|\\[!,;:]|\\?\$")
_WRAPPED_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION_VARIANT = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SPACE = re.compile(r"\\ |[\s~]+")
_SPACE_BESIDE_A_SIGN = re.compile(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])")

_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_RATIO = re.compile(r"([+-]?[0-9]+)/([0-9]+)|([+-]?)\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\}")


def compare_plainly(answer: str, truth: str) -> bool | None:
    """True when the texts are equal or are the same number, False when they are different whole numbers, else None.

    Texts are compared as `normalised`. None leaves the verdict to math-verify. The comparison takes microseconds.
    """
    answer, truth = normalised(answer), normalised(truth)
    if answer == truth:
        return bool(truth)
    answer_number, truth_number = number(answer), number(truth)
    if answer_number is None or truth_number is None:
        return None
    if answer_number == truth_number:
        return True
    return False if answer_number.denominator == truth_number.denominator == 1 else None


def normalised(text: str) -> str:
    """Text without LaTeX spacing and font commands, dollar signs and a final full stop."""
    text = _REMOVED.sub("", text.translate(_MINUS_SIGNS))
    text = _WRAPPED_TEXT.sub(r"\1", text)
    text = _FRACTION_VARIANT.sub(r"\\frac", text)
    text = _SPACE.sub(" ", text).strip()
    text = _SPACE_BESIDE_A_SIGN.sub("", text.removesuffix("."))
    return text.replace("\\%", "%").strip()


def number(text: str) -> Fraction | None:
    """Exact value of a normalised text that is one decimal number or one ratio of whole numbers, else None."""
    if len(text) > MAX_NUMBER_CHARACTERS:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if ratio := _RATIO.fullmatch(text):
        top, bottom, sign, latex_top, latex_bottom = ratio.groups()
        numerator, denominator = int(top or latex_top), int(bottom or latex_bottom)
        if denominator:
            return Fraction(-numerator if sign == "-" else numerator, denominator)
    return None
