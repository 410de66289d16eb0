import pytest

from meds_megatron.config import DataConfig
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import build_prompts, encode
from meds_megatron.errors import UserError

SHORT = Problem("short", "What is 2 + 2?", "4", "test")
LONG = Problem("long", "What is " + "1 + " * 100 + "1?", "101", "test")


def test_a_prompt_is_system_message_question_and_generation_prompt(qwen_tokenizer):
    (token_ids,) = encode([SHORT], qwen_tokenizer, DataConfig(system_prompt="Be brief."))
    assert qwen_tokenizer.decode(token_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_token_ids_are_those_of_the_tokenizers_own_template(qwen_tokenizer):
    config = DataConfig()
    messages = [{"role": "system", "content": config.system_prompt}, {"role": "user", "content": SHORT.question}]
    expected = qwen_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode([SHORT], qwen_tokenizer, config) == [expected]


def test_without_a_system_message_the_template_decides(qwen_tokenizer):
    messages = [{"role": "user", "content": SHORT.question}]
    expected = qwen_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode([SHORT], qwen_tokenizer, DataConfig(system_prompt=None)) == [expected]


QWEN3_ENDING = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""The part of Qwen3's chat template that turns thinking off."""


@pytest.mark.parametrize(("enable_thinking", "ending"), [(None, ""), (True, ""), (False, "<think>\n\n</think>\n\n")])
def test_thinking_is_the_templates_default_unless_it_is_set(qwen_tokenizer, monkeypatch, enable_thinking, ending):
    monkeypatch.setattr(qwen_tokenizer, "chat_template", QWEN3_ENDING)
    (token_ids,) = encode([SHORT], qwen_tokenizer, DataConfig(enable_thinking=enable_thinking))
    assert qwen_tokenizer.decode(token_ids).endswith("<|im_start|>assistant\n" + ending)


def test_a_template_without_thinking_ignores_the_switch(qwen_tokenizer):
    plain, switched = (encode([SHORT], qwen_tokenizer, DataConfig(enable_thinking=value)) for value in (None, False))
    assert plain == switched


def test_without_a_template_the_prompt_is_the_question(qwen_tokenizer):
    (token_ids,) = encode([SHORT], qwen_tokenizer, DataConfig(chat_template=False))
    assert qwen_tokenizer.decode(token_ids) == SHORT.question


def test_overlong_prompts_are_skipped_and_counted(qwen_tokenizer):
    prompts, skipped = build_prompts([LONG, SHORT, LONG], qwen_tokenizer, DataConfig(), 100)
    assert [prompt.problem for prompt in prompts] == [SHORT]
    assert skipped == 2


def test_a_prompt_of_exactly_the_limit_fits(qwen_tokenizer):
    length = len(encode([SHORT], qwen_tokenizer, DataConfig())[0])
    assert build_prompts([SHORT], qwen_tokenizer, DataConfig(), length)[1] == 0
    with pytest.raises(UserError, match=f"None of 1 prompts fits .* = {length - 1} .the longest has {length} tokens"):
        build_prompts([SHORT], qwen_tokenizer, DataConfig(), length - 1)


def test_an_overlong_prompt_is_an_error_when_asked(qwen_tokenizer):
    with pytest.raises(UserError, match=r"Problem 'long' has .* but rollout\.max_prompt_tokens is 100"):
        build_prompts([SHORT, LONG], qwen_tokenizer, DataConfig(overlong_prompts="error"), 100)


def test_a_tokenizer_without_template_is_refused(qwen_tokenizer, monkeypatch):
    monkeypatch.setattr(qwen_tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="has no chat template"):
        encode([SHORT], qwen_tokenizer, DataConfig())
    assert encode([SHORT], qwen_tokenizer, DataConfig(chat_template=False))[0]
