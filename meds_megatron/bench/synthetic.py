"""A random model of any shape, and made-up responses with lengths as in a step of training."""

from statistics import NormalDist

import numpy as np

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import ModelShape

MEAN_TOKENS, LONGEST_TOKENS, SHORTEST_TOKENS = 300, 2000, 16
SPREAD = 1.0
"""Standard deviation of the logarithm of a length."""


def long_tailed_lengths(random: np.random.Generator, count: int) -> np.ndarray:
    """Lengths of responses, int64 [B]: log-normal, cut at SHORTEST_TOKENS and LONGEST_TOKENS, mean MEAN_TOKENS.

    One length lies in each of `count` equal parts of the distribution: a few responses have its tail, too.
    """
    quantiles_B = random.permutation((np.arange(count) + random.uniform(0.25, 0.75, count)) / count)
    raw_B = np.exp([SPREAD * NormalDist().inv_cdf(quantile) for quantile in quantiles_B])

    def cut(scale: float) -> np.ndarray:
        return np.clip(scale * raw_B, SHORTEST_TOKENS, LONGEST_TOKENS)

    low, high = 1.0, 10.0 * MEAN_TOKENS
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cut(middle).mean() < MEAN_TOKENS else (low, middle)
    return cut(high).astype(np.int64)


def synthetic_batch(
    random: np.random.Generator, count: int, vocab_size: int, prompt_tokens: tuple[int, int], group: int = 8
) -> TrainBatch:
    """`count` responses of long-tailed lengths in groups with a prompt each, all with an answer and an advantage."""
    lengths_B = long_tailed_lengths(random, count)
    prompt_lengths_B = np.repeat(random.integers(*prompt_tokens, size=-(-count // group)), group)[:count]

    def tokens(size: int) -> np.ndarray:
        return random.integers(0, vocab_size, size)

    batch = TrainBatch.of_responses(
        [tokens(size) for size in prompt_lengths_B],
        [tokens(size) for size in lengths_B],
        logprobs=[np.full(size, -np.log(vocab_size)) for size in lengths_B],
        answer_positions=[int(size) - 2 for size in lengths_B],
        groups=(np.arange(count) // group).tolist(),
    )
    batch.advantages_B = random.standard_normal(count).astype(np.float32)
    batch.loss_weights_B = np.full(count, 1 / lengths_B.sum(), dtype=np.float32)
    batch.logprobs_R = batch.rollout_logprobs_R
    batch.entropy_R = np.zeros_like(batch.logprobs_R)
    return batch


def write_random_model(shape: ModelShape, directory: str) -> None:
    """A Hugging Face directory with a model of random float32 weights, always the same ones, and no tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[shape.architecture]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_theta=shape.rope_theta,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tie_embeddings,
    )
    model_class(config).save_pretrained(directory)
