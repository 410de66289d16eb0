"""Small models for engines, and log-probabilities of transformers for their completions."""

from collections.abc import Sequence
from pathlib import Path

import torch

from meds_megatron.config import Config
from meds_megatron.rollout.samples import Completion
from meds_megatron.toy_tasks.arithmetic_model import build_tokenizer

PROMPTS = [[40 + (7 * i + 11 * j) % 90 for j in range(3 + 2 * i)] for i in range(5)]


def make_model(directory: Path, name: str, seed: int) -> Path:
    """Writes a random model, "qwen2 untied" or "qwen3 tied" for instance, with a tokenizer.

    Norms and biases are away from their initial values, and the logits far apart, so that every weight matters.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    sizes = dict(
        vocab_size=len(tokenizer) + 3,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=name.endswith(" tied"),
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    if name.startswith("qwen2"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def engine_config(engines: int = 1, tensor: int = 1) -> Config:
    config = Config()
    config.model.dtype = "float32"
    config.rollout.engines = engines
    config.rollout.tensor = tensor
    config.rollout.max_prompt_tokens = 300
    config.rollout.max_response_tokens = 100
    config.rollout.max_num_seqs = 64
    config.rollout.enforce_eager = True
    config.rollout.kv_cache_gib = 0.0625
    return config


def logprob_error(
    directory: Path, prompts: list[list[int]], completions: Sequence[Sequence[Completion]], temperature: float = 1.0
) -> float:
    """Largest difference between the log-probabilities of each prompt's completions and those of the model in
    `directory`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    worst = 0.0
    for prompt, completion in ((p, c) for p, of_prompt in zip(prompts, completions, strict=True) for c in of_prompt):
        token_ids = completion.token_ids_S.tolist()
        with torch.no_grad():
            logits_RV = model(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
        expected_R = (logits_RV / temperature).log_softmax(-1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        worst = max(worst, (expected_R - torch.tensor(completion.logprobs_R)).abs().max().item())
    return worst


def comparable(completions: Sequence[Sequence[Completion]]) -> list[list[tuple]]:
    """Completions with arrays as bytes, so that equality is equality of every bit."""
    return [
        [
            (c.token_ids_S.tobytes(), c.logprobs_R.tobytes(), c.text, c.finish_reason, c.version_changes)
            for c in of_prompt
        ]
        for of_prompt in completions
    ]
