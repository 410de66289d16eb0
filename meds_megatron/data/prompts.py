"""Prompts: problems as the token ids that the model is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meds_megatron.config import DataConfig
from meds_megatron.data.problems import Problem
from meds_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A problem and its token ids, chat template included."""

    problem: Problem
    token_ids: list[int]


def build_prompts(
    problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", config: DataConfig, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """The prompts of at most `max_prompt_tokens` tokens, in order, and the number of longer ones that were left out.

    Raises UserError when none fits, when the tokenizer lacks the chat template that the config asks for, and at the
    first long prompt if `config.overlong_prompts` is "error".
    """
    prompts = [Prompt(p, ids) for p, ids in zip(problems, encode(problems, tokenizer, config), strict=True)]
    kept = [prompt for prompt in prompts if 0 < len(prompt.token_ids) <= max_prompt_tokens]
    overlong = next((prompt for prompt in prompts if len(prompt.token_ids) > max_prompt_tokens), None)
    if overlong and config.overlong_prompts == "error":
        raise UserError(
            f"Problem {overlong.problem.id!r} has {len(overlong.token_ids)} prompt tokens, but "
            f"rollout.max_prompt_tokens is {max_prompt_tokens}: raise that limit, or set data.overlong_prompts to skip"
        )
    if not kept:
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        raise UserError(
            f"None of {len(prompts)} prompts fits rollout.max_prompt_tokens = {max_prompt_tokens} (the longest has "
            f"{longest} tokens): raise that limit, or use other problems"
        )
    return kept, len(prompts) - len(kept)


def encode(problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> list[list[int]]:
    """Token ids of each problem's prompt, of any length.

    With `config.chat_template` the question is the user's message after the system message. A null `system_prompt`
    passes no system message; some templates (Qwen's) then insert a default one. `enable_thinking`, where it is not
    null, is passed on to the template. Without `chat_template` the prompt is the question itself.
    """
    if config.chat_template and not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer in {tokenizer.name_or_path} has no chat template, which data.chat_template asks for: "
            "add chat_template.jinja to that directory, or set data.chat_template to false"
        )
    texts = [_text(problem, tokenizer, config) for problem in problems]
    # One call for all is several times as fast as one for each.
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def _text(problem: Problem, tokenizer: "PreTrainedTokenizerBase", config: DataConfig) -> str:
    if not config.chat_template:
        return problem.question
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    messages = [*system, {"role": "user", "content": problem.question}]
    thinking: dict[str, Any] = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **thinking)
    except Exception as error:
        # A template is a program: what it raises depends on its errors, and on what the sandbox refuses it.
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"The chat template of the tokenizer in {tokenizer.name_or_path} fails ({reason[0]}): correct it, or set "
            "data.chat_template to false"
        ) from error
    assert isinstance(text, str)
    return text
