r"""The rules by which LIMO's evaluation grades answers, for figures that are comparable with published ones.

Source of the rules: `eval/utils/parser.py` and `eval/utils/grader.py` of github.com/GAIR-NLP/LIMO. Known false accepts,
kept on purpose: a number equals a hundredth of it and its hundredfold (5 = 500), and any number within 1e-4; units and
one-letter words count as nothing (5 m = 5 km); brackets and parentheses do not differ, lists have no order; a box that
is not closed counts. Two departures: a text is given to sympy's Python parser only where it is plain arithmetic, since
that parser runs what it is given; and matrices, sets and mixed numbers are parsed by math-verify's successor of the
parser that LIMO uses, which is no longer installable.

Grader processes import this file (`reward.worker`): it imports nothing of the package, and sympy only when it judges.
"""

import re
from collections.abc import Callable, Iterator
from math import isclose
from typing import Any

MAX_DEPTH = 5
TOLERANCE = 1e-4
_UNITS = (
    "east|degree|mph|kmph|ft|m sqaure| m east|sq m|deg|mile|q .|monkey|prime|ratio|profit of rs|rd|o|gm|p . m|lb|"
    "tile|per|dm|lt|gain|ab|way|west|a .|b .|c .|d .|e .|f .|g .|h .|t|a|h|no change|men|soldier|pie|bc|excess|"
    "st|inches|noon|percent|by|gal|kmh|c|acre|rise|a . m|th|π r 2|sq|mark|l|toy|coin|sq . m|gallon|° f|profit|"
    "minw|yr|women|feet|am|pm|hr|cu cm|square|v â € ™|are|rupee|rounds|cubic|cc|mtr|s|ohm|number|kmph|day|hour|"
    "minute|min|second|man|woman|sec|cube|mt|sq inch|mp|∏ cm ³|hectare|more|sec|unit|cu . m|cm 2|rs .|rs|kg|g|"
    "month|km|m|cm|mm|apple|liter|loss|yard|pure|year|increase|decrease|d|less|Surface|litre|pi sq m|s .|metre|"
    "meter|inch"
).split("|")
"""Regular expressions of words without a meaning, in the order in which they are removed; then come their plurals."""
_UNIT_PATTERNS = [re.compile(rf"(^|\W){unit}($|\W)") for unit in [*_UNITS, *(f"{unit}s" for unit in _UNITS)]]
_MONTHS = re.compile(
    r"\b(January|February|March|April|May|June|July|August|September|October|November|December)\b", re.IGNORECASE
)
_SPELLINGS = {"bmatrix": "pmatrix", "tfrac": "frac", "dfrac": "frac", "\\neq": "\\ne", "\\leq": "\\le", "\\geq": "\\ge"}
_BRACES = {"\\left": "", "\\right": "", "\\{": "{", "\\}": "}"}
_DEGREES_AND_DOLLARS = {"^{\\circ}": "", "^\\circ": "", "\\$": "", "$": "", "\\(": "", "\\)": ""}
_ASSIGNMENTS = ["x=", "y=", "z=", "x\\in", "y\\in", "z\\in", "x\\to", "y\\to", "z\\to"]
_SETS_AND_PERCENTS = {
    "\\emptyset": "{}",
    "(-\\infty,\\infty)": "\\mathbb{R}",
    "\\%": "",
    "%": "",
}
_CHOICE = re.compile(r"\([A-E]\)|[A-E][.):]|\*\*[A-E]\*\*")
_BRACKETED = re.compile(r"[(\[].+[)\]]")
_MATRIX = re.compile(r"\\begin\{[pb]matrix\}(.*)\\end\{[pb]matrix\}", re.DOTALL)
_ARITHMETIC = re.compile(r"[0-9a-zA-Z\s.+\-*/()=]*")
_WORD = re.compile(r"[a-zA-Z]{2,}|\.\s*[a-zA-Z]|[a-zA-Z]\s*\(")


def extract(response: str) -> str:
    r"""The text after the last `boxed`: up to the brace that closes it, up to the end if none does, or without a brace
    up to a dollar sign; "" without one. Line breaks and a final full stop are dropped."""
    response = response.replace("\u043a\u0438", "")
    if "boxed" not in response:
        return ""
    rest = response.rpartition("boxed")[2]
    answer = _braced(rest) if rest.startswith("{") else rest.partition("$")[0].strip()
    answer = re.sub(r"\n\s*", "", answer).removeprefix(":")
    return answer.removesuffix(".").removesuffix("/")


def _braced(text: str) -> str:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return text[1:]


def judge(answer: str, truth: str) -> tuple[bool, str]:
    """Whether LIMO's rules accept the answer; the second item is empty."""
    return accepts(normalised(answer), normalised(truth)), ""


def normalised(text: str) -> str:
    """Text without what LIMO's rules drop, and with fractions and roots in braces."""
    text = _replaced(text.strip().replace("\n", "").rstrip("."), {"\\!": ""})
    text = re.sub(r"\\begin\{array\}\{.*?\}", r"\\begin{pmatrix}", text)
    text = re.sub(r"\\end\{array\}", r"\\end{pmatrix}", text)
    text = _without_units(_replaced(text, _SPELLINGS | _BRACES))
    text = _as_digits(_replaced(text, _DEGREES_AND_DOLLARS))
    text = re.sub(r"\\text\{(.*?)\}", r"\1", text)
    text = _replaced(text, dict.fromkeys(_ASSIGNMENTS, "") | _SETS_AND_PERCENTS)
    text = _replaced(_MONTHS.sub("", text), {" .": " 0.", "{.": "{0.", "infinity": "\\infty"})
    if "\\infty" not in text:
        text = text.replace("inf", "\\infty")
    text = _replaced(text, {"+\\inity": "\\infty", "and": "", "\\mathbf": ""})
    text = re.sub(r"\\mbox{.*?}", "", text)
    if "j" in text and "i" not in text:
        text = text.replace("j", "i")
    text = re.sub(r"(\d+)\.0*([^\d])", r"\1\2", text)
    text = re.sub(r"(\d+)\.0*$", r"\1", text)
    if text.startswith("."):
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = re.sub(r"\\sqrt(\w+)", r"\\sqrt{\1}", text).replace(" ", "")
    return _slash_as_fraction(_fractions_in_braces(text))


def _replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def _without_units(text: str) -> str:
    r"""Text without a final `\text{...}` and without the words of _UNITS, unless nothing else is left."""
    text = re.sub(r"\\text{.*?}$", "", text).strip() or text
    for pattern in _UNIT_PATTERNS:
        text = pattern.sub(r"\1\2", text) or text
    return text


def _as_digits(text: str) -> str:
    """The number that the number words of a text spell, or the text if there are none."""
    from word2number import w2n

    try:
        return str(w2n.word_to_num(text))
    except (ValueError, IndexError):
        return text


def _fractions_in_braces(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`; the text as it is where a `\frac` has less than two characters behind it."""
    first, *rest = text.split("\\frac")
    parts = [first]
    for part in rest:
        if part.startswith("{"):
            parts.append(part)
        elif len(part) < 2:
            return text
        else:
            denominator = part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}"
            parts.append(f"{{{part[0]}}}{denominator}")
    return "\\frac".join(parts)


def _slash_as_fraction(text: str) -> str:
    """`a/b` as a LaTeX fraction where both are whole numbers or have a root."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    for part in parts:
        try:
            whole = "sqrt" in part or str(int(part)) == part
        except ValueError:
            whole = False
        if not whole:
            return text
    return f"\\frac{{{parts[0]}}}{{{parts[1]}}}"


def accepts(answer: str, truth: str, depth: int = 0) -> bool:
    """LIMO's comparison of two normalised texts: as text, as choices, as lists, as numbers, as structures, and last by
    sympy."""
    if depth > MAX_DEPTH:
        return False
    if answer.strip().lower() == truth.strip().lower() or _is_the_choice(answer, truth):
        return True

    def same(one: str, other: str) -> bool:
        return accepts(one, other, depth + 1)

    if (choice := _CHOICE.match(answer)) and same(answer[choice.end() :].strip(), truth):
        return True
    if "," in answer and "," in truth:
        parts, truth_parts = (sorted(part.strip() for part in text.split(",")) for text in (answer, truth))
        if _all_same(parts, truth_parts, same):
            return True
    number, truth_number = _number(answer), _number(truth)
    if number is not None and truth_number is not None:
        return any(isclose(truth_number * factor, number, abs_tol=TOLERANCE) for factor in (0.01, 1, 100))
    if not answer:
        return False
    return _same_structure(answer.strip(), truth.strip(), same)


def _is_the_choice(answer: str, truth: str) -> bool:
    """Whether the truth is a letter A to E and the last such letter of the answer is the same."""
    if truth not in ("A", "B", "C", "D", "E"):
        return False
    letters = re.findall(r"\b[A-E]\b", answer.strip("\n").rstrip(".").rstrip("/").strip(" ").lstrip(":").upper())
    return bool(letters) and letters[-1] == truth


def _number(text: str) -> float | None:
    r"""A text as a number: without commas, a percentage as its hundredth."""
    text = text.replace(",", "")
    try:
        return float(text)
    except ValueError:
        pass
    if not text.endswith("%"):
        return None
    try:
        return float(text[:-1].removesuffix("\\")) / 100
    except ValueError:
        return None


def _all_same(answers: list[str], truths: list[str], same: Callable[[str, str], bool]) -> bool:
    return len(answers) == len(truths) and all(map(same, answers, truths))


def _same_structure(answer: str, truth: str, same: Callable[[str, str], bool]) -> bool:
    """Whether texts, tuples, matrices or equations are equal part by part, or the whole is to sympy."""
    if "pmatrix" in answer and "pmatrix" not in truth:
        rows = (row.strip("{}").replace(",", "\\") for row in re.findall(r"\{.*,.*\}", truth))
        truth = ", ".join(f"\\begin{{pmatrix}}{row}\\end{{pmatrix}}" for row in rows)
    if _without_brackets(answer, truth):
        return True
    bracketed = _BRACKETED.match(answer) and _BRACKETED.match(truth)
    if bracketed and _all_same(answer[1:-1].split(","), truth[1:-1].split(","), same):
        return True
    matrix, truth_matrix = _MATRIX.fullmatch(answer), _MATRIX.fullmatch(truth)
    if matrix and truth_matrix and _same_matrix(matrix[1], truth_matrix[1], same):
        return True
    equations = answer.count("="), truth.count("=")
    if equations == (1, 1):
        differences = ["{} - ({})".format(*(side.strip() for side in text.split("="))) for text in (answer, truth)]
        if symbolically_equal(*differences) or symbolically_equal(f"-({differences[0]})", differences[1]):
            return True
    elif equations == (1, 0):
        name, value = answer.split("=")
        if len(name.strip()) <= 2 and same(value, truth):
            return True
    elif equations == (0, 1):
        name, value = truth.split("=")
        if len(name.strip()) <= 2 and same(answer, value):
            return True
    return symbolically_equal(answer, truth)


def _without_brackets(answer: str, truth: str) -> bool:
    """Whether two texts are equal without brackets; square ones count only where the kinds differ on the two sides."""
    ends = answer[:1] + answer[-1:]
    if (ends == "[]" and not truth.startswith("(")) or (ends == "()" and not truth.startswith("[")):
        answer, truth = answer.strip("[]()"), truth.strip("[]()")
    plain = [re.sub(r"[{}()]", "", text).lower() for text in (answer, truth)]
    return plain[0] == plain[1]


def _same_matrix(answer: str, truth: str, same: Callable[[str, str], bool]) -> bool:
    answers, truths = ([row.strip() for row in text.split("\\\\") if row.strip()] for text in (answer, truth))
    return len(answers) == len(truths) and all(
        _all_same(one.split("&"), other.split("&"), same) for one, other in zip(answers, truths, strict=True)
    )


def symbolically_equal(answer: str, truth: str) -> bool:
    """Whether sympy finds two texts equal: as texts, as expressions, as equations, as numbers, or as matrices rounded
    to three decimals. What sympy cannot do with them counts as different."""
    import sympy

    a, b = _parsed(answer), _parsed(truth)
    if isinstance(a, str) or isinstance(b, str):
        return str(a) == str(b)  # sympy would run a text that it is given in place of an expression.

    def as_matrices() -> bool:
        rounded = [matrix.applyfunc(lambda value: round(value, 3)) for matrix in (a, b)]
        return a.shape == b.shape and rounded[0].equals(rounded[1])

    checks: list[Callable[[], Any]] = [
        lambda: str(a) == str(b) or a == b,
        lambda: sympy.simplify(a - b) == 0 if (equal := a.equals(b)) is None else equal,
        lambda: abs(a.lhs - a.rhs).equals(abs(b.lhs - b.rhs)),
        lambda: isclose(float(sympy.N(b)), float(sympy.N(a)), abs_tol=TOLERANCE),
        as_matrices,
    ]
    return any(map(_holds, checks))


def _holds(check: Callable[[], Any]) -> bool:
    try:
        return bool(check())
    except MemoryError:
        raise
    except Exception:
        # Which exceptions sympy raises for what it cannot compute is not known.
        return False


def _parsed(text: str) -> Any:
    """A text as sympy reads it, or the text itself."""
    for parser in _parsers():
        for spelling in (text.replace("\\\\", "\\"), text):
            try:
                return parser(spelling)
            except MemoryError:
                raise
            except Exception:
                # As above: the next parser may read it.
                continue
    return text


def _parsers() -> Iterator[Callable[[str], Any]]:
    from latex2sympy2_extended import latex2sympy

    return iter((_parse_latex, _parse_arithmetic, latex2sympy))


def _parse_latex(text: str) -> Any:
    """sympy's LaTeX parser, of whatever prefix it can read. Its own entry point refuses the antlr4 that math-verify
    requires, which reads the same grammar."""
    import antlr4
    from sympy.parsing.latex import _parse_latex_antlr as latex

    listener = latex.MathErrorListener(text.strip())
    lexer = latex.LaTeXLexer(antlr4.InputStream(text.strip()))
    parser = latex.LaTeXParser(antlr4.CommonTokenStream(lexer))
    for part in (lexer, parser):
        part.removeErrorListeners()
        part.addErrorListener(listener)
    return latex.convert_relation(parser.math().relation())


def _parse_arithmetic(text: str) -> Any:
    """sympy's Python parser, for numbers, one-letter symbols and operators: it evaluates what it is given."""
    from sympy.parsing.sympy_parser import parse_expr

    if not _ARITHMETIC.fullmatch(text) or _WORD.search(text):
        raise ValueError(text)
    return parse_expr(text)
