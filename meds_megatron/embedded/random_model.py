"""A randomly initialised Qwen directory with the tokenizer of another: the real vocabulary without a download."""

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from meds_megatron.config import RandomModelConfig
from meds_megatron.embedded.boxing import teach_boxing
from meds_megatron.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
INIT_STD = 0.02
MAX_POSITIONS = 32768


def make_random_model(config: RandomModelConfig, directory: Path) -> None:
    """Write a model of the given shape into `directory`, which exists: fp32 weights, normal with std 0.02.

    With `boxing_steps` it has then learnt to give a number in a box.

    Raises UserError when the tokenizer's directory has no tokenizer or more tokens than `vocab_size` rows.
    """
    source = Path(config.tokenizer).expanduser()
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json: give model.random.tokenizer a directory with tokenizer files")
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = config.vocab_size or len(tokenizer)
    if rows < len(tokenizer):
        raise UserError(
            f"model.random.vocab_size is {rows}, but {source} has {len(tokenizer)} tokens: give at least as many rows"
        )
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[config.architecture]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    hf_config = config_class(
        vocab_size=rows,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.ffn_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=INIT_STD,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = model_class(hf_config)
        teach_boxing(model, tokenizer, config.boxing_steps, config.seed)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
