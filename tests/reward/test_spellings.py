r"""Verdicts on spellings of numbers in scientific notation, units, tuples, intervals and sets, each judged by hand."""

import pytest

from meds_megatron.reward.grading import Grade, GraderPool

pytestmark = pytest.mark.usefixtures("processes")

RIGHT_NUMBERS = {
    "4.5e33": [
        r"4.5 \times 10^{33}",
        r"4.5\times10^{33}",
        r"4.5 \times 10^33",
        r"4.5 \cdot 10^{33}",
        r"4.5\cdot10^{33}",
        r"4.5 \ast 10^{33}",
        "4.5*10^33",
        "4.5 x 10^33",
        "4.5 × 10^{33}",
        "4.5·10³³",
        "4.5E33",
        "4.5E+33",
        "4.5e+33",
        r"4.5\mathrm{E}33",
        r"4.5\text{e}33",
        r"4.5 \times {10}^{33}",
        r"4.5 \times 10^{+33}",
        "$4.5 \\times 10^{33}$",
        r"45 \times 10^{32}",
        r"0.45 \times 10^{34}",
        r"4{,}500 \times 10^{30}",
        r"4,500 \times 10^{30}",
        r"\frac{9}{2} \times 10^{33}",
        r"\num{4.5e33}",
        "4500000000000000000000000000000000",
        r"\approx 4.5 \times 10^{33}",
        r"\sim 4.5e33",
        r"L = 4.5 \times 10^{33}",
        r"L \approx 4.5 \times 10^{33}",
        r"4.5 \times 10^{33} \text{ m/s}",
        r"4.5 \times 10^{33}\,\mathrm{erg\,s^{-1}}",
        r"4.5 \times 10^{33} \; \text{erg} \cdot \text{s}^{-1}",
        r"4.5 \times 10^{33}~{\rm K}",
        r"4.5 \times 10^{33} \text{ ergs per second}",
        r"4.5 \times 10^{33} M_\odot",
        r"4.5 \times 10^{33} \, \text{kg} \cdot \text{m}^2/\text{s}^2",
        "4.5e33 erg/s",
        "4.5e33 J",
        r"4.5 \times 10^{33} kg m^2",
        r"\SI{4.5e33}{erg\per\second}",
        r"\approx 4.5 \times 10^{33} \text{ erg/s}",
    ],
    r"4.5 \times 10^{33}": ["4.5e33", r"4.5 \cdot 10^{33}", "4.5E33", "4.5e33 erg/s"],
    r"4.5 \times 10^{33} \text{ erg/s}": ["4.5e33", r"4.5\times10^{33}\,\mathrm{erg/s}", "4.5e33 erg/s"],
    "6.5e-2": ["0.065", ".065", r"6.5 \times 10^{-2}", "6.5E-2", "6.5\u00d710\u207b\u00b2", r"\frac{13}{200}"],
    "0.065": ["6.5e-2", r"6.5\times10^{-2}", r"65 \cdot 10^{-3}", "6.5 \\times 10^{\u22122}"],
    "2e-18": [r"2 \times 10^{-18}", "2E-18", r"0.2 \times 10^{-17} \text{ J}", "2.0e-18"],
    "3e8": ["300000000", r"3 \times 10^8", r"3 \times 10^8 \text{ m/s}", "3 \\times 10^{8} m/s", "300,000,000"],
    "1000": ["10^3", "1e3", r"1 \times 10^{3}"],
    "-1.6e-19": [r"-1.6 \times 10^{-19}", r"-1.6 \times 10^{-19} \text{ C}", "\u22121.6e-19", "-1.6E-19 C"],
    "5": [r"\approx 5", r"\sim 5", "\u2248 5", "~5", r"\approx 5 \text{ cm}", r"\simeq 5", "5 m/s", "5 kg m^2", "5 Hz"],
    r"\approx 5": ["5", r"\sim 5", "5.0"],
    r"\frac{\pi}{3}": [r"\approx \frac{\pi}{3}", r"\sim \dfrac{\pi}{3}"],
    "(2.5e7, 1)": [r"(2.5 \times 10^{7}, 1)"],
    "5 m/s": [r"5 \text{ m/s}", r"5\,\mathrm{m/s}", r"5 \text{ m s}^{-1}"],
    "x": [r"x"],
    "2e-1": ["2e-1", "-1+2e", "2e - 1"],
}
WRONG_NUMBERS = {
    "4.5e33": [
        r"4.5 \times 10^{32}",
        "4.5e32",
        "4.5",
        "33",
        "45e33",
        "-4.5e33",
        r"4.5 \times 10^{-33}",
        r"4.50001 \times 10^{33}",
        r"4.5 + 10^{33}",
        r"4.5 \times 33",
        r"4.5e^{33}",
        r"4.5 \times 10^{33} x",
        r"4.5 \times 10^{33} \text{ or } 2",
        r"4.5 \times 10^{32} \text{ m/s}",
        r"10^{33}",
        r"4.5 \times 11^{33}",
    ],
    "7.4e-12": ["5.89e-7", "5.89E-8", r"5.89 \times 10^{-8}", "7.4e-11", "0", "0.0", r"7.41 \times 10^{-12}"],
    "7.4E-12": ["5.89E-8", "0", r"5.89 \times 10^{-9} \text{ m}"],
    "6.5e-2": ["0.65", "0.0651", "6.5", "-2", "6.5e2"],
    "2e-18": ["2e-17", "2e18", r"3 \times 10^{-18}"],
    "5": [r"\approx 6", r"\sim 4", "5 x", r"5 \times 10^{1}", "6 m/s", "5 xy"],
    r"\sim p": ["p"],
    "5 m/s": ["6 m/s", r"6 \text{ m/s}"],
    "0": [r"10^{-20}", "1e-20"],
    r"10^{-20}": [r"2 \cdot 10^{-20}"],
}
RIGHT_STRUCTURES = {
    "(1,2)": ["(1, 2)", r"\left(1, 2\right)", r"\left( 1,\, 2 \right)", "(1.0, 2)", r"(1, \frac{4}{2})", "x=1, y=2"],
    r"(\frac12, \frac32)": [r"\left(\frac{1}{2}, \frac{3}{2}\right)", "(0.5, 1.5)", "(1/2, 3/2)"],
    r"(\frac{1}{3}, 2)": ["(0.333333, 2)"],
    "(x, y+1)": ["(x, 1+y)"],
    "1,2": ["2,1", "1, 2", r"\{1,2\}", "(1,2)", r"\{2, 1\}", r"1 \text{ and } 2", "x=1, x=2"],
    r"\{1,2,3\}": [r"\{3,2,1\}", "1,2,3", r"\left\{1,2,3\right\}"],
    "[1,2]": [r"\left[1, 2\right]", "[1, 2.0]", r"x \in [1,2]"],
    "[1,2)": [r"\left[1, 2\right)", r"[1, \frac{4}{2})"],
    r"(-\infty, 2) \cup (3, \infty)": [r"(-\infty,2)\cup(3,\infty)"],
    r"\frac13E_1+\frac23E_2": [r"\frac{1}{3}E_1+\frac{2}{3}E_2", r"\dfrac{1}{3} E_1 + \dfrac{2}{3} E_2"],
    "N=n": ["N = n", "n"],
    "N=n+1": ["N = n + 1", "N = 1 + n"],
    r"\gamma^2-1": [r"\gamma^{2} - 1"],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"],
    "(1,2,3)": ["(1, 2, 3)", r"(1, 2, \sqrt{9})"],
}
WRONG_STRUCTURES = {
    "(1,2)": ["1,2", r"\{1,2\}", "(2,1)", "[1,2]", "(1,2]", "(1,3)", "(1,2,3)", "2(1,2)", "(1,2)+1", "(2,4)", "1"],
    r"\left(\frac{1}{2},\frac{3}{2}\right)": [
        r"2\left(\frac{1}{2},\frac{3}{2}\right)",
        r"\left(\frac{1}{2},\frac{3}{2}\right)+1",
        r"\frac{1}{2},\frac{3}{2}",
    ],
    "(1,2,3)": ["1,2,3", r"\{1,2,3\}", "(3,2,1)", "(1,2)", r"2(1,2,3)"],
    r"\{1,2\}": ["(1,2)", r"\{1,3\}", r"\{1,2,3\}", "1,3"],
    "1,2": ["1,3", "1", "1,2,3", "(1,3)"],
    "[1,2]": ["(1,2)", "[1,2)", "[1,3]", "1,2"],
    r"\frac13E_1+\frac23E_2": [r"\frac83E_1+\frac23E_2", r"\frac{8}{3}E_1+\frac{2}{3}E_2", r"\frac23E_2"],
    r"\frac{1}{3}E_1+\frac{2}{3}E_2": [r"\frac{8}{3}E_1+\frac{2}{3}E_2", r"\frac{1}{2}E_1+\frac{2}{3}E_2"],
    "N=n": ["N=n+1", "N=2n", "n+1"],
    "N=n+1": ["N=n", "N=n+2"],
    r"\gamma^2-1": [r"\gamma^2-0", r"\gamma^2", r"\gamma^2+1"],
}


def cases(table: dict[str, list[str]]) -> list[tuple[str, str]]:
    return [(answer, truth) for truth, answers in table.items() for answer in answers]


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=1, timeout_seconds=30) as pool:
        yield pool


def verdict(pool, answer, truth) -> Grade:
    (grade,) = pool.grade([f"So it is \\boxed{{{answer}}}."], [truth])
    assert grade.outcome == "graded"
    return grade


@pytest.mark.parametrize(("answer", "truth"), cases(RIGHT_NUMBERS))
def test_another_spelling_of_a_number_is_right(pool, answer, truth):
    assert verdict(pool, answer, truth).correct


@pytest.mark.parametrize(("answer", "truth"), cases(WRONG_NUMBERS))
def test_another_number_is_wrong(pool, answer, truth):
    assert not verdict(pool, answer, truth).correct


@pytest.mark.parametrize(("answer", "truth"), cases(RIGHT_STRUCTURES))
def test_another_spelling_of_a_structure_is_right(pool, answer, truth):
    assert verdict(pool, answer, truth).correct


@pytest.mark.parametrize(("answer", "truth"), cases(WRONG_STRUCTURES))
def test_another_structure_is_wrong(pool, answer, truth):
    assert not verdict(pool, answer, truth).correct


def test_the_tables_are_large():
    assert len(cases(RIGHT_NUMBERS)) >= 60 and len(cases(WRONG_NUMBERS)) >= 30
    assert len(cases(RIGHT_STRUCTURES)) + len(cases(WRONG_STRUCTURES)) >= 70
