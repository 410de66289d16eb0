r"""A randomly initialised Qwen with an existing tokenizer: a real vocabulary without a download.

A short warm-up can train it to answer every prompt with a number in `\boxed{}`. Its answers are right only by chance,
but graders, fingerprints and the error memory get real text.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from meds_megatron.config import RandomModelConfig
from meds_megatron.data.tokenizer import TOKENIZER_FILES, load_tokenizer
from meds_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INIT_STD = 0.02
MAX_POSITIONS = 32768
BOXING_BATCH = 8
BOXING_LONGEST_PROMPT = 160
BOXING_LR = 6e-3


def make_random_model(config: RandomModelConfig, directory: Path) -> None:
    """Write a model of the given shape into the existing `directory`: float32 weights, normal with std 0.02.

    With `boxing_steps` the warm-up follows. Raises UserError when the tokenizer's directory has no tokenizer or more
    tokens than `vocab_size` rows.
    """
    assert config.tokenizer is not None  # `validate_model` has checked it.
    source = Path(config.tokenizer).expanduser()
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json: give model.random.tokenizer a directory with tokenizer files")
    tokenizer = load_tokenizer(source)
    rows = config.vocab_size or len(tokenizer)
    if rows < len(tokenizer):
        raise UserError(
            f"model.random.vocab_size is {rows}, but {source} has {len(tokenizer)} tokens: give at least as many rows"
        )
    model = build_qwen(config, tokenizer, rows, INIT_STD, MAX_POSITIONS)
    _train_boxing(model, tokenizer, config.boxing_steps, config.seed)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def build_qwen(
    shape: RandomModelConfig, tokenizer: "PreTrainedTokenizerBase", rows: int, init_std: float, max_positions: int
) -> "PreTrainedModel":
    """A Qwen2 or Qwen3 with `rows` embedding rows; float32 weights, normal with `init_std`, drawn from `shape.seed`."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[shape.architecture]
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = config_class(
        vocab_size=rows,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        initializer_range=init_std,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        model = model_class(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, eos_token_id=end, pad_token_id=pad)
    return model


def _train_boxing(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", steps: int, seed: int) -> None:
    """Supervised steps on random tokens followed by the start of the assistant's turn and a boxed random number.

    The learning rate falls to 0 linearly. The loss is that of the answer's tokens, and only they pass the head, which
    keeps a step with a vocabulary of real size cheap.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=BOXING_LR, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    opening = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    head_VH = model.get_output_embeddings().weight
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = BOXING_LR * (1 - step / steps)
        length = int(torch.randint(1, BOXING_LONGEST_PROMPT, (1,), generator=generator))
        prompts_BT = torch.randint(0, len(tokenizer), (BOXING_BATCH, length), generator=generator)
        # Two digits each, so that all rows have the same length.
        numbers = torch.randint(10, 100, (BOXING_BATCH,), generator=generator).tolist()
        answers_BA = torch.tensor([_boxed(tokenizer, number) for number in numbers])
        openings_BO = torch.tensor([opening] * BOXING_BATCH)
        hidden_BTH = model.base_model(torch.cat([prompts_BT, openings_BO, answers_BA], dim=1)).last_hidden_state
        predicting_BAH = hidden_BTH[:, -answers_BA.shape[1] - 1 : -1]
        loss = F.cross_entropy((predicting_BAH @ head_VH.T).flatten(0, 1), answers_BA.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _boxed(tokenizer: "PreTrainedTokenizerBase", number: int) -> list[int]:
    text = f"\\boxed{{{number}}}"
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
