"""The tokenizer of a model directory."""

from pathlib import Path
from typing import TYPE_CHECKING

from meds_megatron.errors import UserError
from meds_megatron.lean_imports import lean_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files of a tokenizer, which may have fewer."""


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in `directory`; no code that lies there is run. Raises UserError where there is none to read."""
    with lean_transformers():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Which exception a broken file raises depends on the tokenizer's kind, and its text may have many lines.
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise UserError(
            f"the tokenizer in {directory} cannot be read ({reason[0]}): copy the model's tokenizer files there again"
        ) from error
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:
        # transformers makes an empty tokenizer of a directory without one.
        raise UserError(f"{directory} has no tokenizer: copy the model's tokenizer files there")
    return tokenizer
