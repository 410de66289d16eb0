import json
import re
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.rollout.answer_position import BOX_AT_END, FIRST_WINDOW, NO_BOX, AnswerLocator, AnswerPosition
from meds_megatron.toy_tasks.arithmetic_model import build_tokenizer
from tests.examples import examples

OPENING = re.compile(r"\\boxed\s*\{")

HAND_CHECKED = [
    # text, the token that holds the brace of the last box, the token after it
    (r"So $\boxed{5}$.", "{", "5"),
    (r"\boxed{-3}", "{-", "3"),
    (r"\boxed{+1}", "{", "+"),
    (r"\boxed{.5}", "{", "."),
    (r"\boxed{\frac{1}{2}}", "{\\", "frac"),
    (r"\boxed{\dfrac12}", "{\\", "d"),
    (r"\boxed{\sqrt{2}}", "{\\", "sqrt"),
    (r"\boxed{\pi}", "{\\", "pi"),
    (r"\boxed{\$18}", "{\\", "$"),
    (r"\boxed{\text{Evelyn}}", "{\\", "text"),
    (r"\boxed{\left\{1\right\}}", "{\\", "left"),
    (r"\boxed{\{1,2\}}", "{\\", "{"),
    (r"\[\boxed{\begin{pmatrix}1\\2\end{pmatrix}}\]", "{\\", "begin"),
    (r"\boxed{(1, 2)}", "{(", "1"),
    (r"\boxed{()}", "{", "()}"),
    (r"\boxed{[0, 1)}", "{", "["),
    (r"\boxed{{a}}", "{{", "a"),
    (r"\boxed{$5$}", "{$", "5"),
    (r"\boxed{x = 3}", "{x", " ="),
    (r"\boxed{x^2+1}", "{x", "^"),
    (r"\boxed{|x|}", "{|", "x"),
    (r"\boxed{<5}", "{", "<"),
    (r"\boxed{12,345}", "{", "1"),
    (r'\boxed{"A"}', '{"', "A"),
    (r"\boxed{**A**}", "{", "**"),
    (r"\boxed{%}", "{%", "}"),
    (r"\boxed{ 7 }", "{", " "),
    (r"\boxed {5}", " {", "5"),
    (r"\boxed {\pi}", " {\\", "pi"),
    ("\\boxed\n{5}", "{", "5"),
    ("\\boxed{\n5}", "{\n", "5"),
    ("\\boxed{\t5}", "{", "\t"),
    (r"(\boxed{5})", "{", "5"),
    (r"=\boxed{5}=", "{", "5"),
    (r"\\boxed{5}", "{", "5"),
    (r"\boxed{\boxed{5}}", "{", "5"),
    (r"\boxed{x=\boxed{-5}}", "{-", "5"),
    (r"\boxed{1} and \boxed{2}", "{", "2"),
    (r"\boxed{1}, \boxed{-2}", "{-", "2"),
    (r"\boxed{1}, not \boxed 2", "{", "1"),
    (r"first \boxed{1}, then boxed{2}", "{", "1"),
    (r"\boxed{}, hm", "{},", " hm"),
    (r"答案是\boxed{四}", "{", "四"),
    (r"ответ: \boxed{да}", "{", "да"),
    (r"🙂\boxed{🙂}", "{", "🙂"),
    (r"cut off in \boxed{12", "{", "1"),
    (r"the end \boxed{5<|im_end|>", "{", "5"),
]


@pytest.fixture(scope="module")
def locator(qwen_tokenizer):
    return AnswerLocator(qwen_tokenizer)


def brute_force(tokenizer, token_ids: list[int]) -> int | None:
    """Index of the first token with which the decoded beginning has as many boxes as the whole."""

    def boxes(length: int) -> int:
        return len(OPENING.findall(tokenizer.decode(token_ids[:length], skip_special_tokens=False)))

    total = boxes(len(token_ids))
    return bisect_left(range(len(token_ids) + 1), total, key=boxes) - 1 if total else None


@pytest.mark.parametrize(("text", "brace", "target"), HAND_CHECKED)
def test_hand_checked_answers(locator, qwen_tokenizer, text, brace, target):
    token_ids = qwen_tokenizer(text)["input_ids"]
    position = locator.locate(token_ids)
    assert position.reason == ""
    assert qwen_tokenizer.decode(token_ids[position.token]) == brace
    assert qwen_tokenizer.decode(token_ids[position.token + 1]) == target
    assert position.token == brute_force(qwen_tokenizer, token_ids)


@pytest.mark.parametrize(
    "text", ["", "the answer is 5", "boxed{5}", "\\Boxed{5}", "\\boxed 5", "\\bo xed{5}", "\\boxed"]
)
def test_without_a_box_there_is_no_position(locator, qwen_tokenizer, text):
    assert locator.locate(qwen_tokenizer(text)["input_ids"]) == NO_BOX


@pytest.mark.parametrize("text", ["\\boxed{", "\\boxed{<|im_end|>", "\\boxed{-<|endoftext|>", "\\boxed{1} \\boxed{"])
def test_a_box_at_the_very_end_has_no_answer(locator, qwen_tokenizer, text):
    assert locator.locate(qwen_tokenizer(text)["input_ids"]) == BOX_AT_END


def test_a_box_in_the_prompt_does_not_count(locator, qwen_tokenizer):
    prompt, response = (
        qwen_tokenizer(text)["input_ids"] for text in ("Put it within \\boxed{}. How many?", "It is 5.")
    )
    assert locator.locate(prompt + response).reason == ""
    assert locator.locate(response) == NO_BOX


def test_positions_in_real_solutions(locator, qwen_tokenizer, shared_data):
    lines = (shared_data / "data" / "math500.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["solution"] for line in lines]
    boxed = 0
    for solution in solutions:
        token_ids = qwen_tokenizer(solution)["input_ids"]
        position = locator.locate(token_ids)
        expected = brute_force(qwen_tokenizer, token_ids)
        assert position == (NO_BOX if expected is None else AnswerPosition(expected, ""))
        boxed += expected is not None
    assert boxed == sum("\\boxed" in solution for solution in solutions) == 500


def test_the_box_may_be_anywhere_in_a_long_response(locator, qwen_tokenizer):
    box = qwen_tokenizer("\\boxed{5}")["input_ids"]
    filler = qwen_tokenizer(" so")["input_ids"]
    for after in (*range(FIRST_WINDOW - 8, FIRST_WINDOW + 8), 1000):
        token_ids = filler * 500 + box + filler * after
        assert locator.locate(token_ids) == AnswerPosition(502, "")


def test_padded_vocabulary_rows_have_no_text(locator, qwen_tokenizer):
    padded_row = 151935
    box = qwen_tokenizer("\\boxed{5}")["input_ids"]
    token_ids = [padded_row, *box[:2], padded_row, *box[2:]]
    assert locator.locate(token_ids) == AnswerPosition(4, "")
    assert locator.locate([*box[:3], padded_row]) == AnswerPosition(2, "")


@examples(300)
@given(
    st.lists(
        st.sampled_from(["\\", "boxed", "{", " {", "{\\", "{-", "bo", "xed", " ", "5", "}", "{}", "🙂", "é", "\n"])
    )
)
def test_however_the_text_is_cut_into_tokens(locator, qwen_tokenizer, pieces):
    token_ids = [token_id for piece in pieces for token_id in qwen_tokenizer(piece)["input_ids"]]
    expected = brute_force(qwen_tokenizer, token_ids)
    position = locator.locate(token_ids)
    if expected is None:
        assert position == NO_BOX
    elif expected + 1 == len(token_ids):
        assert position == BOX_AT_END
    else:
        assert position == AnswerPosition(expected, "")


@examples(200)
@given(st.text())
def test_the_bytes_of_the_tokens_are_the_text(locator, qwen_tokenizer, text):
    token_ids = qwen_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    normalised = qwen_tokenizer.backend_tokenizer.normalizer
    expected = normalised.normalize_str(text) if normalised else text
    assert b"".join(locator._piece(token_id) for token_id in token_ids) == expected.encode()


def test_the_toy_tokenizer_holds_the_whole_box_in_one_token():
    tokenizer = build_tokenizer()
    token_ids = tokenizer.encode("6*4=24 \\boxed{26}", add_special_tokens=False)
    position = AnswerLocator(tokenizer).locate([*token_ids, tokenizer.eos_token_id])
    assert tokenizer.decode(token_ids[position.token]) == " \\boxed{"
    assert tokenizer.decode(token_ids[position.token + 1]) == "2"


def test_a_tokenizer_of_whole_words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "so": 1, "\\boxed{": 2, "5": 3, "}": 4}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")))
    assert AnswerLocator(words).locate([1, 2, 3, 4]) == AnswerPosition(1, "")
