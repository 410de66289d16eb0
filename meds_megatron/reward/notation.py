r"""Notations of one value: LaTeX spacing and fonts, numbers in decimal, ratio and scientific notation, units."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction

MAX_NUMBER_CHARACTERS = 64
MAX_QUANTITY_CHARACTERS = 160

MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-"})
_REMOVED = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\displaystyle(?![a-zA-Z])|\\[!,;:]|\\?\$")
_WRAPPED_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_FRACTION_VARIANT = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_FRACTION = re.compile(r"\\frac ?(?:\{([^{}]*)\}|([0-9])) ?(?:\{([^{}]*)\}|([0-9]))")
_SPACE = re.compile(r"\\ |[\s~]+")
_SPACE_BESIDE_A_SIGN = re.compile(r"(?<![a-zA-Z0-9]) | (?![a-zA-Z0-9])")

_APPROXIMATE = re.compile(r"[\s$]*(?:\\(?:approx|approxeq|thickapprox|simeq|sim)(?![a-zA-Z])|[\u2248\u223c~])")
_NUMBER_FIRST = re.compile(r"(?:\\[,;:! ]|\s)*[+-]?(?:\\?\$|\\[dtc]?frac|\\sqrt|\\pi|[0-9.])")
_SIMILAR = re.compile(r"\\(?:sim|simeq|thickapprox)(?![a-zA-Z])\s*(?=[+-]?[0-9.])|\u2248")

_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_RATIO = re.compile(r"([+-]?[0-9]+)/([0-9]+)|([+-]?)\\frac\{([+-]?[0-9]+)\}\{([0-9]+)\}")

_UNSIGNED = r"[0-9]++(?:\.[0-9]*+)?|\.[0-9]++"
_EXPONENT = r"[+-]?[0-9]{1,3}"
_E_NUMBER = re.compile(rf"([+-]?)({_UNSIGNED})([eE])\{{?({_EXPONENT})\}}?")
_E_NUMBER_WITHIN = re.compile(rf"(?<![a-zA-Z0-9_.\\}}])({_UNSIGNED})([eE])({_EXPONENT})(?![a-zA-Z0-9_{{^]|\.[0-9])")
_POWER_OF_TEN = re.compile(
    r"([+-]?)(?:(.+?)\s*(?:\\times|\\cdot|\\ast|[*x\u00d7\u00b7\u22c5\u2217])\s*)?"
    rf"(?:10|\{{10\}})\^(?:\{{({_EXPONENT})\}}|({_EXPONENT}))"
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_TARGET = re.compile(r"([a-zA-Z](?:_(?:[a-zA-Z0-9]|\{[a-zA-Z0-9]*\}))?)(?:=|\\approx)")

_SIUNITX = re.compile(r"\\(?:num|SI|qty)\s*\{([^{}]*)\}(?:\s*\{[^{}]*\})?")
_MARKED_UNIT = re.compile(
    r"(?:\\(?:text|textrm|textnormal|textit|mathrm|mathit|mbox|operatorname|unit|si)(?![a-zA-Z])|\{\s*\\rm(?![a-zA-Z])).*",
    re.DOTALL,
)
_UNIT_COMMAND = re.compile(r"\\(?:text[a-z]*|math[a-z]*|mbox|operatorname|cdot|unit|si|rm)(?![a-zA-Z])")
_UNIT_MARKUP = re.compile(r"\^\s*(?:[0-9]|\{\s*[+-]?\s*[0-9]\s*\})|\\[a-zA-Z]+|\\[,;:! ]|[\s{}()/.*~\u00b7\u22c5]")
_NOT_A_UNIT = re.compile(
    r"\b(?:hundreds?|thousands?|[mbtr]+illions?|dozens?|percent|pct|and|or|not|to|more|less|than|over|pi|base|[ei]|mod)\b",
    re.IGNORECASE,
)
_UNIT_SYMBOL = (
    r"(?:(?:\\mu ?|da|[YZEPTGMkhdcmunpfaµμ])?"
    r"(?:mol|cd|Hz|Pa|eV|bar|pc|cal|Wb|rad|sr|Bq|Sv|Gy|ohm|lm|lx|erg|\\Omega|[mgsAKNJWCVFTHLlM])"
    r"|min|hrs?|h|days?|years?|yrs?|AU|ly|dyn|dynes?|ergs?|Gauss|G|amu|u|\\AA|Å|sec|seconds?|meters?|grams?|Kelvin"
    r"|Joules?|Watts?|Hertz|Newtons?|mi|miles?|mph|ft|lb|[MLR]_\{?\\(?:odot|oplus)\}?|(?:\^\{?\\circ\}?|°) ?[CF])"
)
_UNIT_FACTOR = rf"{_UNIT_SYMBOL}(?:\^[0-9]|\^\{{-?[0-9]\}})?"
_BARE_UNIT = re.compile(rf" ?{_UNIT_FACTOR}(?:(?: |\\cdot ?|[/*·⋅]| ?per ){_UNIT_FACTOR}){{0,4}}$")


@dataclass(frozen=True)
class Quantity:
    """A number with the letters of its unit ("" without one) and the symbol that it is assigned to ("" without one).

    `scientific` marks a number with a power of ten; `certain` is False for one like `2e-1`, which may also mean 2e - 1.
    """

    value: Fraction
    scientific: bool = False
    certain: bool = True
    unit: str = ""
    target: str = ""


def normalised(text: str) -> str:
    r"""Text without LaTeX spacing and font commands, dollar signs, a leading `\approx` and a final full stop."""
    text = _REMOVED.sub("", without_approximation(text).translate(MINUS_SIGNS))
    text = _WRAPPED_TEXT.sub(r"\1", text)
    text = _FRACTION_VARIANT.sub(r"\\frac", text)
    text = _SPACE.sub(" ", text).strip()
    text = _FRACTION.sub(_with_braces, text)
    text = _SPACE_BESIDE_A_SIGN.sub("", text.removesuffix("."))
    return text.replace("\\%", "%").strip()


def _with_braces(fraction: re.Match) -> str:
    top, top_digit, bottom, bottom_digit = fraction.groups()
    return rf"\frac{{{top_digit or top}}}{{{bottom_digit or bottom}}}"


def without_approximation(text: str) -> str:
    r"""Text without a `\approx` or `\sim` in front of its number; those of `\sim p` and `x \approx 5` stay."""
    sign = _APPROXIMATE.match(text)
    return text[sign.end() :] if sign and _NUMBER_FIRST.match(text, sign.end()) else text


def for_math_verify(text: str) -> str:
    r"""Text in spellings that math-verify can parse: it reads `4.5e33` as 4.5 e 33, and `x \sim 5` not at all.

    `2e-1`, which may also mean 2e - 1, stays.
    """

    def power_of_ten(match: re.Match) -> str:
        return match[0] if _may_be_a_sum(*match.groups()) else rf"{match[1]}\times 10^{{{match[3]}}}"

    return _E_NUMBER_WITHIN.sub(power_of_ten, _SIMILAR.sub(r"\\approx ", without_approximation(text)))


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


def quantity(text: str) -> Quantity | None:
    r"""Exact value of a text that is one number in any notation, with or without a unit and `x =` before it, else None.

    A unit is one in `\text{}` or the like, whatever it is, or one that consists of known symbols (`m/s`).
    """
    if len(text) > MAX_QUANTITY_CHARACTERS:
        return None
    text = _SIUNITX.sub(r"\1", text)
    unit = ""
    if (marked := _MARKED_UNIT.search(text)) and _is_unit(marked.group()):
        unit, text = marked.group(), text[: marked.start()]
    text = normalised(text).replace("{,}", ",")
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match.group().translate(_SUPERSCRIPTS)}}}", text)
    target = _TARGET.match(text)
    text = text[target.end() :] if target else text
    found = _scientific_or_plain(text)
    if found is None and not unit and (bare := _BARE_UNIT.search(text)):
        unit, found = bare.group(), _scientific_or_plain(text[: bare.start()])
    if found is None:
        return None
    unit = "".join(
        filter(str.isalpha, re.sub(r"\\(?:text[a-z]*|math[a-z]*|mbox|operatorname|cdot|unit|si|rm)", "", unit))
    )
    return replace(found, unit=unit, target=target[1] if target else "")


def _is_unit(text: str) -> bool:
    """Whether a text consists of words and exponents, without other numbers and words that change the value."""
    rest = _UNIT_MARKUP.sub("", text)
    return (not rest or rest.isalpha()) and not _NOT_A_UNIT.search(text)


def _scientific_or_plain(text: str) -> Quantity | None:
    """Quantity of a normalised text without its unit."""
    text = text.strip()
    if match := _E_NUMBER.fullmatch(text):
        sign, mantissa, letter, exponent = match.groups()
        certain = not _may_be_a_sum(mantissa, letter, exponent)
    elif match := _POWER_OF_TEN.fullmatch(text):
        sign, mantissa, braced, plain = match.groups()
        mantissa, exponent, certain = mantissa or "1", braced or plain, True
    else:
        value = number(text)
        return None if value is None else Quantity(value)
    value = number(mantissa)
    if value is None or mantissa[0] in "+-":
        return None
    value *= Fraction(10) ** int(exponent)
    return Quantity(-value if sign == "-" else value, scientific=True, certain=certain)


def _may_be_a_sum(mantissa: str, letter: str, exponent: str) -> bool:
    """Whether e-notation may also mean a multiple of Euler's number plus or minus a whole number, as in `2e-1`."""
    return letter == "e" and mantissa.isdecimal() and exponent[0] in "+-"
