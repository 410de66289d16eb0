"""Small Hugging Face directories as transformers makes them, and a reader of their tensors."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

VOCAB, LAYERS = 261, 8
MODELS = ["qwen2 tied", "qwen2 untied", "qwen3 tied", "qwen3 untied"]


def make_source(directory: Path, name: str) -> Path:
    """A random model of transformers' own making, tied ones in several files, with a tokenizer and a chat template."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(MODELS.index(name))
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=name.endswith(" tied"),
    )
    if name.startswith("qwen2"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(directory, max_shard_size="60KB" if name.endswith(" tied") else "5GB")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "trainer_state.json").write_text("{}")
    return directory


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, each of which must be in one file only."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                assert name not in tensors, f"{name} is in two files"
                tensors[name] = file.get_tensor(name)
    return tensors


def unequal(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit the same, or only in one of the two."""
    names = before.keys() | after.keys()
    same = [n for n in before.keys() & after.keys() if before[n].dtype == after[n].dtype and before[n].equal(after[n])]
    return sorted(names - set(same))
