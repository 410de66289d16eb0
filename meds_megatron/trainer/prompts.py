"""The prompts of a run's data sets."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from meds_megatron.config import Config
from meds_megatron.data.problems import load_problems
from meds_megatron.data.prompts import Prompt, build_prompts
from meds_megatron.toy_tasks.arithmetic import Split
from meds_megatron.toy_tasks.problems import toy_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and to validate on."""

    train: list[Prompt]
    validation: list[Prompt]
    skipped: int
    """Prompts left out because they are too long."""


def read_prompts(config: Config, tokenizer: "PreTrainedTokenizerBase") -> Prompts:
    """The prompts of both splits. Raises UserError for what cannot be used."""
    data, longest = config.data, config.rollout.max_prompt_tokens

    def prompts(sources: list[str], limit: int | None, split: Split) -> tuple[list[Prompt], int]:
        if not sources:
            return [], 0
        arithmetic = partial(toy_problems, split, data.arithmetic_rules, seed=config.train.seed)
        problems = load_problems(sources, limit, {"arithmetic": arithmetic})
        return build_prompts(problems, tokenizer, data, longest)

    train, skipped_train = prompts(data.train, data.limit_train, "train")
    validation, skipped_validation = prompts(data.validation, data.limit_validation, "validation")
    return Prompts(train, validation, skipped_train + skipped_validation)
