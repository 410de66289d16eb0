import json
import time

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from meds_megatron.reward.differences import surely_different


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("x+1", "x+2"),
        ("2x+1", "2x"),
        (r"\frac{x}{2}", r"\frac{x}{3}"),
        (r"\sqrt{2}", r"\sqrt{3}"),
        (r"\sin(x)", r"\cos(x)"),
        (r"\ln x", r"\ln(x)+1"),
        ("e^{x}", "e^{-x}"),
        (r"\pi r^2", r"2\pi r"),
        ("n!", "(n+1)!"),
        ("1.5", "1.6"),
        (r"7.4 \times 10^{-12}", r"5.89 \times 10^{-12}"),
        (r"10^{-20}x", r"2 \cdot 10^{-20}x"),
        ("3+4i", "3-4i"),
        ("N=n+1", "N=n"),
        ("N=n+1", "n"),
        (r"\gamma^2-1", r"\gamma^2"),
        ("1,2", "(1,2)"),
        (r"\{1,2\}", "(1,2)"),
        ("(1,2)", r"\{1,2\}"),
        ("(1,2,3)", "(1,2)"),
        ("2(x,y)", "(x,y)"),
        ("(x,y)+1", "(x,y)"),
        ("(1,2)", "5"),
        ("[1,3)", "[1,2)"),
        (r"\{1,4\}", r"\{1,2\}"),
        ("1,2,3", "1,2"),
    ],
)
def test_other_values_and_structures_are_different(answer, truth):
    assert surely_different(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("x+1", "1+x"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"\frac12x", "x/2"),
        (r"\sqrt{8}", r"2\sqrt2"),
        (r"\sqrt[3]{8}", "2"),
        (r"\sin^2 x+\cos^2 x", r"\sin^2 y + \cos^2(y)"),
        (r"\frac{1}{\cos x}", r"\sec x"),
        (r"\ln(e^{x})", "x"),
        ("e^{i\\pi}", "-1"),
        ("n!", "n(n-1)!"),
        ("0.333333", r"\frac{1}{3}"),
        ("3.141593", r"\pi"),
        ("({-0.333333}, 1)", r"(-\frac13, 1)"),
        ("10^{20}+1-10^{20}", "1"),
        (r"\left( 1,\, 2 \right)", "(1,2)"),
        ("0+(1,2)", "(1,2)"),
        (r"2(\frac12,1)", "(1,2)"),
        ("2,1", r"\{1,2\}"),
        ("1,1,2", "1,2"),
        ("x=1,y=2", "(1,2)"),
        ("x=5", "5"),
        ("x=y", "y=x"),
        (r"\gamma=2\gamma", r"\gamma=3\gamma"),
        ("N = n", "N=n"),
    ],
)
def test_equal_answers_are_not_different(answer, truth):
    assert not surely_different(answer, truth)
    assert not surely_different(truth, answer)


def test_a_tuple_may_be_the_answer_to_a_list_but_not_a_list_to_a_tuple():
    assert not surely_different("(1,2)", "1,2")
    assert surely_different("1,2", "(1,2)")


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        (r"3\frac{1}{2}", "2"),
        (r"\log 2", "5"),
        ("1/2x", "7x"),
        ("5 m", "6"),
        ("50\\%", "7"),
        ("27^\\circ", "28"),
        (r"\text{east}", r"\text{west}"),
        ("xy", "xyz"),
        (r"\pm 1", "2"),
        ("1,234", "1,235"),
        ("1011_2", "1012_2"),
        (r"\sin 2x", "x"),
        (r"\sin^{-1}(x)", r"\sin(x)^{-1}"),
        ("10^33", "10^34"),
        (r"\sqrt[3]{-8}", "5"),
        ("(-8)^{1/3}", "5"),
        (r"\Gamma(n+1)", r"n\Gamma(n)"),
        ("3!!", "4"),
        ("4.5e33", "4.6e33"),
        ("f'(x)", "f(x)"),
        ("x < 5", "x < 6"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,3)"),
        ("A", "B"),
        ("(1,2", "(1,3)"),
        ("", "1"),
        ("1,", "1,2"),
        ("9" * 400, "1"),
        (r"\frac{1}{0}", "1"),
    ],
)
def test_texts_without_one_certain_reading_are_not_different(answer, truth):
    assert not surely_different(answer, truth)
    assert not surely_different(truth, answer)


def rewritings(parts: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
    """Pairs of texts with one value, from smaller such pairs."""

    def of_two(rewrite):
        return st.tuples(parts, parts).map(lambda pair: rewrite(*pair[0], *pair[1]))

    return st.one_of(
        of_two(lambda a, a2, b, b2: (f"{a} + ({b})", f"{{{b2}}} + {a2}")),
        of_two(lambda a, a2, b, b2: (f"{a} - ({b})", f"-({b2}) + {a2}")),
        of_two(lambda a, a2, b, b2: (f"({a})({b})", f"\\left({b2}\\right) \\cdot ({a2})")),
        of_two(lambda a, a2, b, b2: (f"3({a} + {b})", f"3({a2}) + 3({b2})")),
        of_two(lambda a, a2, b, b2: (f"\\frac{{{a}}}{{({b})^2+1}}", f"({a2})/(({b2})^{{2}} + 1)")),
        of_two(lambda a, a2, b, b2: (f"({a}+({b}))^2", f"({a2})^2 + 2({a2})({b2}) + ({b2})^2")),
        parts.map(lambda pair: (f"\\sqrt{{({pair[0]})^2+1}}", f"(1 + ({pair[1]})({pair[1]}))^{{\\frac12}}")),
        parts.map(lambda pair: (f"\\sin({pair[0]})\\cos({pair[0]})", f"\\frac{{1}}{{2}}\\sin(2({pair[1]}))")),
    )


SYMBOLS = ["x", "y", "n", "2", "3", "0.5", "\\frac12", "\\pi", "e", "x_1", "\\alpha"]
EQUAL_TEXTS = st.recursive(st.sampled_from([(text, text) for text in SYMBOLS]), rewritings, max_leaves=6)


@given(EQUAL_TEXTS)
def test_rewritten_expressions_are_not_different(pair):
    text, other = pair
    assert not surely_different(other, text)
    assert not surely_different(f"({other}, {text})", f"({text}, {other})")


@given(EQUAL_TEXTS)
def test_an_addend_makes_an_expression_different_also_within_a_tuple(pair):
    text, other = pair
    event(f"different: {surely_different(f'{other} + 10', text)}")
    if surely_different(f"{other} + 10", text):
        assert surely_different(f"({other}, 1) + 10", f"({text}, 1)")
        assert not surely_different(f"{other} + 10", f"10 + {text}")


def test_real_answers_in_other_spellings_are_not_different(shared_data):
    lines = (shared_data / "data" / "math500.jsonl").read_text().splitlines()
    decided = 0
    for answer in (json.loads(line)["answer"] for line in lines):
        for variant in (answer, f" {answer}.", f"${answer}$", answer.replace("\\frac", "\\dfrac"), f"0+({answer})"):
            assert not surely_different(variant, answer), (variant, answer)
        decided += surely_different(f"({answer})+1", answer)
    assert decided > 300


@pytest.mark.parametrize(
    "text",
    [
        "(" * 1000 + "1" + ")" * 1000,
        "{" * 2000,
        r"\{" * 900,
        "\\" * 2000,
        r"\frac" * 400,
        r"\sqrt" * 400,
        r"\sin" * 500,
        "x^" * 900 + "x",
        "-" * 2000 + "1",
        "1+" * 999 + "1",
        "x" * 2000,
        "9" * 2000,
        "9^{9^{9^{9^{9}}}}",
        "(9!)!",
        "1!" * 900,
        "10^{999999999}",
        ",".join(f"x+{number}" for number in range(300)),
        ",".join("1" + "+x" * 45 for _ in range(19)),
        "((((1,2)),1)" * 100,
        "0^{-1}",
        " " * 2000,
    ],
)
def test_hostile_texts_take_little_time_and_raise_nothing(text):
    begin = time.process_time()
    for answer in (text, f"({text},1)", f"\\{{{text},1\\}}"):
        for truth in (text, f"({text},1)", "(1,2)", "x+1", "1,2"):
            surely_different(answer, truth)
            surely_different(truth, answer)
    assert time.process_time() - begin < 5
