r"""Pairs of answers that are certainly different, whatever math-verify's verdict on them.

math-verify 0.9 accepts some wrong answers. It compares only the last fraction of a text that it cannot parse
(`\frac83E_1+\frac23E_2` with `\frac13E_1+\frac23E_2`, `2(\frac12,\frac32)` with `(\frac12,\frac32)`), reads
`\gamma^2-1` as the gamma function of -1, reads capitals as small letters, calls two equations without a solution equal
(`N=n+1` and `N=n`), and calls an ordered pair equal to the set of its elements. The check here evaluates both texts at
random values of their symbols. It takes time linear in their lengths, uses floating-point numbers only and never calls
sympy.
"""

import cmath
import math
import random
import re
from collections.abc import Callable
from functools import lru_cache, partial

from meds_megatron.reward.notation import MINUS_SIGNS

MAX_DEPTH = 40
MAX_ELEMENTS = 20
POINTS = 3
"""Values of the symbols tried; two texts differ only if they do at each."""
REPEATS = 3
"""Evaluations at each point; their spread bounds the rounding error."""
PERTURBATION = 1e-10
"""Random relative error of each operation, far above that of a float, so that cancellation shows in the spread."""
RELATIVE_TOLERANCE = 1e-7
DECIMAL_TOLERANCE = 2e-6
"""Absolute tolerance where one side is a decimal number: math-verify rounds to six decimals."""

_REMOVED = re.compile(
    r"\\(?:left|right|displaystyle|[bB]igg?[lr]?)(?![a-zA-Z])|\\[!,;:]|\\(?=\s)|[~$]|\.\s*$|(?<=\\)[dtc](?=frac(?![a-zA-Z]))"
)
_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(?P<name>\\?[a-zA-Z]+)|(?P<sign>\\[{}]|[^\s\\]))")
_DECIMAL = re.compile(r"[+-]?[0-9]*\.[0-9]+")
_EXPONENT = re.compile(r"[eE][+-]?[0-9]")
_THOUSANDS = re.compile(r"[0-9],[0-9]{3}(?![0-9])")
_ASSIGNMENT = re.compile(r"\s*(\\?[a-zA-Z]+(?:\s*_\s*(?:[a-zA-Z0-9]|\{[a-zA-Z0-9]*\}))?)\s*=([^=]*)")
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega ell hbar".split()
)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    **{name: getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")},
    "ln": lambda x: cmath.log(_positive(x)),
    "arctan": lambda x: cmath.atan(_real(x)),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
}

Value = complex | tuple[complex, ...]
"""A number, or the elements of a tuple."""


class _Undecided(Exception):
    """The text has no certain reading as a number, or none at this point."""


def surely_different(answer: str, truth: str) -> bool:
    r"""Whether the answer is certainly not the truth: by structure, or by value at every random point tried.

    An ordered tuple is neither a list without parentheses nor a set; a list as truth accepts a tuple, since data sets
    write lists of solutions both ways. Only texts with one certain reading are compared: an unknown command, a word, a
    mixed number, `\log` without base, `1/2x`, units, percents, and symbols that only one of the two contains all give
    False.
    """
    return _differ(*(_REMOVED.sub("", text.translate(MINUS_SIGNS)) for text in (answer, truth)))


def _differ(answer: str, truth: str) -> bool:
    answer_kind, answers = _structure(answer)
    truth_kind, truths = _structure(truth)
    if not (answers and truths):
        return _expressions_differ(answer, truth)
    if max(len(answers), len(truths)) > MAX_ELEMENTS or not all(map(str.strip, answers + truths)):
        return False
    if (answer_kind, truth_kind) in (("", "()"), (r"\{\}", "()"), ("()", r"\{\}")):
        return "=" not in answer + truth
    if {answer_kind, truth_kind} <= {"", r"\{\}"}:
        table = [[_expressions_differ(a, t) for t in truths] for a in answers]
        return any(map(all, table)) or any(map(all, zip(*table, strict=True)))
    if answer_kind == truth_kind:
        return len(answers) != len(truths) or any(map(_expressions_differ, answers, truths))
    return False


def _structure(text: str) -> tuple[str, list[str]]:
    r"""Brackets around a text ("()", "[)", "\{\}", or "" for none) and its elements, [] if it has no comma."""
    text = text.strip()
    if _THOUSANDS.search(text):
        return "", []
    elements = _split(text)
    if len(elements) > 1:
        return "", elements
    brackets = re.fullmatch(r"([(\[]|\\\{)(.*?)([)\]]|\\\})", text, re.DOTALL)
    if not brackets or (brackets[1] == r"\{") != (brackets[3] == r"\}"):
        return "", []
    elements = _split(brackets[2])  # None of (a, b) + (c, d), whose inner text is not balanced.
    return (brackets[1] + brackets[3], elements) if len(elements) > 1 else ("", [])


def _split(text: str) -> list[str]:
    """The parts of a text between commas outside all brackets, [] if brackets do not match."""
    parts, depth = [""], 0
    for token in re.findall(r"\\[{}]|.", text, re.DOTALL):
        depth += (token in ("{", "(", "[", r"\{")) - (token in ("}", ")", "]", r"\}"))
        if depth < 0:
            return []
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts if depth == 0 else []


def _expressions_differ(answer: str, truth: str) -> bool:
    """Whether two expressions, or two assignments to one symbol, differ in value at every point."""
    sides = [_ASSIGNMENT.fullmatch(text) for text in (answer, truth)]
    targets = [re.sub(r"[\s{}\\]", "", side.group(1)) for side in sides if side]
    if len(set(targets)) > 1:
        return False
    expressions = [side.group(2) if side else text for side, text in zip(sides, (answer, truth), strict=True)]
    is_rounded = any(_DECIMAL.fullmatch(expression.strip("{}() ")) for expression in expressions)
    tolerance = DECIMAL_TOLERANCE if is_rounded else 0.0
    try:
        return all(_differ_at(point, expressions, targets, tolerance) for point in range(POINTS))
    except (_Undecided, ArithmeticError, ValueError):
        return False


def _differ_at(point: int, expressions: list[str], targets: list[str], tolerance: float) -> bool:
    (answers, symbols), (truths, other_symbols) = (_values(expression, point) for expression in expressions)
    if symbols != other_symbols or symbols & set(targets):
        return False
    lengths = {len(value) if isinstance(value, tuple) else 0 for value in answers + truths}
    if len(lengths) > 1:
        return 0 not in lengths or not symbols  # A symbol may stand for a vector.
    columns = [list(zip(*map(_elements, values), strict=True)) for values in (answers, truths)]
    return any(_numbers_differ(a, t, tolerance) for a, t in zip(*columns, strict=True))


@lru_cache(maxsize=256)
def _values(expression: str, point: int) -> tuple[list[Value], set[str]]:
    """REPEATS values of an expression at one point, and the symbols in it."""
    runs = [_Evaluation(expression, point, repeat) for repeat in range(REPEATS)]
    return [run.value for run in runs], runs[0].symbols


def _numbers_differ(answers: tuple[complex, ...], truths: tuple[complex, ...], tolerance: float) -> bool:
    if not all(map(cmath.isfinite, answers + truths)):
        return False
    spread = sum(max(abs(value - values[0]) for value in values) for values in (answers, truths))
    size = max(map(abs, answers + truths))
    return abs(answers[0] - truths[0]) > tolerance + RELATIVE_TOLERANCE * size + 1000 * spread


def _plus(sign: int, a: complex, b: complex) -> complex:
    return a + sign * b


def _times(sign: int, a: complex, b: complex) -> complex:
    return a * (sign * b)


class _Evaluation:
    """Value of an expression at one point, with a random error in each operation; `symbols` holds those it contains.

    Each symbol has a positive value that depends on its name and the point. Raises _Undecided, ArithmeticError or
    ValueError where there is none.
    """

    def __init__(self, text: str, point: int, repeat: int) -> None:
        self.text, self.position, self.depth = text, 0, 0
        self.point = point
        self.symbols: set[str] = set()
        self.errors = random.Random(repeat)
        self.value = self._sum()
        if self._next():
            raise _Undecided

    def _next(self) -> str:
        """The token at the current position, "" at the end."""
        match = _TOKEN.match(self.text, self.position)
        if match is None and self.text[self.position :].strip():
            raise _Undecided
        return match.group().strip() if match else ""

    def _take(self) -> str:
        token = self._next()
        match = _TOKEN.match(self.text, self.position)
        self.position = match.end() if match else self.position
        return token

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise _Undecided

    def _rounded(self, value: complex) -> complex:
        return value * (1 + PERTURBATION * self.errors.uniform(-1, 1))

    def _combine(self, operation: Callable[[complex, complex], complex], left: Value, right: Value) -> Value:
        """Operation on two numbers, or on a number and each element of a tuple."""
        if isinstance(left, tuple):
            return tuple(self._rounded(operation(element, _number(right))) for element in left)
        if isinstance(right, tuple):
            return tuple(self._rounded(operation(left, element)) for element in right)
        return self._rounded(operation(left, right))

    def _sum(self) -> Value:
        sign = self._sign()
        value = self._combine(lambda a, b: a * b, sign, self._product()) if sign < 0 else self._product()
        while self._next() in ("+", "-"):
            sign = self._sign()
            value = self._combine(partial(_plus, sign), value, self._product())
        return value

    def _sign(self) -> int:
        """-1 for an odd number of minus signs, else 1."""
        sign = 1
        while self._next() in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        return sign

    def _product(self) -> Value:
        previous = self._next()
        value = self._power()
        while True:
            token = self._next()
            if token in ("*", r"\cdot", r"\times"):
                self._take()
                sign = self._sign()
                previous = self._next()
                value = self._combine(partial(_times, sign), value, self._power())
            elif token in ("/", r"\div"):
                self._take()
                previous = ""
                divisor = _number(self._power())
                if self._is_factor(self._next()):
                    raise _Undecided  # 1/2x
                value = self._combine(lambda a, b: a / b, value, divisor)
            elif self._is_factor(token):
                if token[0].isdigit() or (token == r"\frac" and previous[:1].isdigit()):
                    raise _Undecided  # x2, or a mixed number.
                if previous[1:] in _FUNCTIONS and token[1:] not in _FUNCTIONS:
                    raise _Undecided  # \sin(x)y
                previous = token
                value = self._combine(lambda a, b: a * b, value, self._power())
            else:
                return value

    def _is_factor(self, token: str) -> bool:
        return token[:1].isalnum() or token in ("(", "{") or (token[:1] == "\\" and token[1:2].isalpha())

    def _power(self) -> Value:
        is_function = self._next()[1:] in _FUNCTIONS
        value = self._atom()
        if self._next() == "!":
            self._take()
            value = self._rounded(math.gamma(_real(_number(value)) + 1))
        if self._next() == "!":
            raise _Undecided  # n!!
        if self._next() == "^":
            if is_function:
                raise _Undecided  # \sin(x)^2
            self._take()
            value = self._raised(_number(value), _number(self._argument()))
            if self._next() in ("^", "!"):
                raise _Undecided
        return value

    def _raised(self, base: complex, exponent: complex) -> complex:
        if (base.real <= 0 or base.imag) and exponent != round(exponent.real):
            raise _Undecided  # More than one value.
        return self._rounded(base**exponent)

    def _argument(self) -> Value:
        """Argument of a command or an exponent: a group, or one digit or symbol."""
        token = self._next()
        if token[:1].isdigit():
            self.position = self.text.index(token[0], self.position) + 1
            return complex(int(token[0]))
        if token == "{" or token[:1] == "\\" or token.isalpha():
            return self._atom()
        raise _Undecided

    def _atom(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Undecided
        token = self._take()
        if token[:1].isdigit() or token[:1] == ".":
            value: Value = self._literal(token)
        elif token == "{":
            value = self._sum()
            self._expect("}")
        elif token == "(":
            elements = [self._sum()]
            while self._next() == ",":
                self._take()
                elements.append(self._sum())
            self._expect(")")
            value = elements[0] if len(elements) == 1 else tuple(map(_number, elements))
        elif token == r"\frac":
            top, bottom = self._argument(), _number(self._argument())
            value = self._combine(lambda a, b: a / b, top, bottom)
        elif token == r"\sqrt":
            value = self._root()
        elif token[:1] == "\\" and token[1:] in _FUNCTIONS:
            value = self._function(token[1:])
        else:
            value = self._symbol(token)
        self.depth -= 1
        return value

    def _literal(self, token: str) -> complex:
        following = self._next()
        if following[:1] in ("_", ".") or following[:1].isdigit() or _EXPONENT.match(self.text, self.position):
            raise _Undecided
        return complex(float(token))

    def _root(self) -> complex:
        degree = complex(2)
        if self._next() == "[":
            self._take()
            degree = _number(self._sum())
            self._expect("]")
        return self._rounded(_positive(_number(self._argument())) ** (1 / degree))

    def _function(self, name: str) -> complex:
        power = 1.0
        if self._next() == "^":
            self._take()
            power = _real(_number(self._argument()))
            if power < 1:
                raise _Undecided  # \sin^{-1}
        grouped = self._next() in ("(", "{")
        argument = _number(self._atom())
        if not grouped and (self._is_factor(self._next()) or self._next() in ("^", "_", "!")):
            raise _Undecided  # \sin 2x
        return self._rounded(_FUNCTIONS[name](argument) ** power)

    def _symbol(self, token: str) -> complex:
        """Value of a letter with its subscript; `e`, `i` and `\\pi` without one are the constants."""
        name = token.removeprefix("\\")
        if not (name in _GREEK or name == "pi" if token[:1] == "\\" else len(token) == 1 and token.isalpha()):
            raise _Undecided
        if self._next() == "_":
            self._take()
            match = re.compile(r"\s*(?:\{([a-zA-Z0-9]+)\}|([a-zA-Z0-9]))").match(self.text, self.position)
            if not match:
                raise _Undecided
            self.position = match.end()
            name = f"{name}_{match.group(1) or match.group(2)}"
        if self._next() in ("'", "_") or (token[:1] == "\\" and self._next() == "("):
            raise _Undecided  # A derivative, or a function such as \Gamma(x).
        constants = {"e": math.e, "i": 1j, "pi": math.pi}
        if name in constants:
            return complex(constants[name])
        self.symbols.add(name)
        return complex(random.Random(f"{self.point} {name}").uniform(0.3, 1.9))


def _number(value: Value) -> complex:
    if isinstance(value, tuple):
        raise _Undecided
    return value


def _elements(value: Value) -> tuple[complex, ...]:
    return value if isinstance(value, tuple) else (value,)


def _real(value: complex) -> float:
    if value.imag:
        raise _Undecided
    return value.real


def _positive(value: complex) -> float:
    if value.imag or value.real <= 0:
        raise _Undecided  # More than one value.
    return value.real
