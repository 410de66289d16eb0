"""Prompts: problems as the model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


class PromptEncoder:
    """Turns problems into token ids the way `config` says.

    With `chat_template` the question is the user's message after the system line; a null `system_prompt` gives the
    template none, and what the template then does is its own business (Qwen's puts in a default). Without it the
    question is given as it is.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, max_prompt_tokens: int) -> None:
        if config.chat_template and not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template, which data.chat_template asks for: "
                "add chat_template.jinja to that directory, or set data.chat_template to false"
            )
        self.tokenizer = tokenizer
        self.config = config
        self.max_prompt_tokens = max_prompt_tokens

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's token ids, of whatever length."""
        return self.encode_all([problem])[0]

    def encode_all(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The same for many problems, tokenized together, which is several times as fast."""
        texts = [self.text(problem) for problem in problems]
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def text(self, problem: Problem) -> str:
        """The prompt as text, special tokens spelled out."""
        if not self.config.chat_template:
            return problem.question
        system = [] if self.config.system_prompt is None else [{"role": "system", "content": self.config.system_prompt}]
        messages = [*system, {"role": "user", "content": problem.question}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def fits(self, token_ids: Sequence[int]) -> bool:
        return 0 < len(token_ids) <= self.max_prompt_tokens


def build_prompts(
    problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", config: DataConfig, max_prompt_tokens: int
) -> tuple[list[Prompt], int]:
    """The prompts that fit, in order, and how many were left out for being longer than `max_prompt_tokens`.

    Raises UserError when none fits, and at the first long one where `config.overlong_prompts` is "error".
    """
    encoder = PromptEncoder(tokenizer, config, max_prompt_tokens)
    prompts = [Prompt(p, ids) for p, ids in zip(problems, encoder.encode_all(problems), strict=True)]
    kept = [prompt for prompt in prompts if encoder.fits(prompt.token_ids)]
    overlong = next((prompt for prompt in prompts if not encoder.fits(prompt.token_ids)), None)
    if overlong and config.overlong_prompts == "error":
        raise UserError(
            f"Problem {overlong.problem.id!r} has {len(overlong.token_ids)} prompt tokens, but "
            f"rollout.max_prompt_tokens is {max_prompt_tokens}: raise that limit, or set data.overlong_prompts to skip"
        )
    if not kept:
        longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
        raise UserError(
            f"None of {len(prompts)} prompts fits rollout.max_prompt_tokens = {max_prompt_tokens} (the longest has "
            f"{longest} tokens): raise that limit, or give other problems"
        )
    return kept, len(prompts) - len(kept)
