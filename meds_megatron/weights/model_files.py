"""The files of a model directory other than its weights."""

import shutil
from pathlib import Path

# Everything besides the weights that makes the directory usable: a model card or training state does not belong here.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "LICENSE",
)


def copy_model_files(source: Path, target: Path) -> None:
    """Copies the files of a model directory other than its weights, byte for byte."""
    for name in MODEL_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
