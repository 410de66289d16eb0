"""Memory of an engine rank: its weights, what a step of it needs, and the KV cache, for which the plan has the rest.

vLLM is given the KV cache in bytes: what it would measure as free depends on what the trainer happens to hold then.
"""

from dataclasses import dataclass

from meds_megatron.config import Config, ModelShape
from meds_megatron.config.schema import CPU_KV_CACHE_GIB
from meds_megatron.plan.hardware import GIB, VLLM_BATCH_TOKENS, VLLM_BLOCK_TOKENS, VLLM_GRAPH_GIB
from meds_megatron.plan.sizes import ITEM_BYTES, engine_elements


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one engine rank."""

    weights: int
    work: int
    """Activations of the largest step, sampler and CUDA graphs."""
    kv_cache: int
    """Negative where nothing is left for it."""
    kv_bytes_per_token: int
    longest: int
    """Tokens of the longest prompt and response."""

    @property
    def total(self) -> int:
        return self.weights + self.work + self.kv_cache

    @property
    def full_sequences(self) -> int:
        """Sequences of the longest prompt and response that the KV cache holds at once; vLLM refuses 0."""
        return max(0, self.kv_cache // (self.kv_bytes_per_token * self.longest))


def engine_item_bytes(config: Config) -> int:
    """Bytes of a weight of the engines."""
    return ITEM_BYTES[config.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype]


def engine_memory(config: Config, shape: ModelShape, room: int | None) -> EngineMemory:
    """Memory of one rank of an engine. `room` is what the fullest GPU has for it; None without GPUs.

    Activations of the largest step, after vLLM's profiling run: hidden states, residual and norm, and both halves and
    product of SwiGLU for VLLM_BATCH_TOKENS tokens; logits, their float32 copy and log-softmax for one token of every
    sequence.
    """
    rollout, item = config.rollout, engine_item_bytes(config)
    weights = engine_elements(shape, rollout.tensor) * item
    per_token = 2 * shape.num_layers * max(1, shape.num_kv_heads // rollout.tensor) * shape.head_dim * item
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    tokens = longest if room is None else max(VLLM_BATCH_TOKENS, rollout.max_num_seqs)
    work = tokens * item * (4 * shape.hidden_size + 3 * shape.ffn_size // rollout.tensor)
    work += rollout.max_num_seqs * shape.vocab_size * (item + 8)
    if room is not None and not rollout.enforce_eager:
        work += int(VLLM_GRAPH_GIB * GIB)
    kv_cache = int(CPU_KV_CACHE_GIB * GIB) if room is None else room - weights - work
    if rollout.kv_cache_gib is not None:
        kv_cache = int(rollout.kv_cache_gib * GIB)
    elif room is not None:
        # One block more, which vLLM keeps for itself.
        most = (rollout.max_num_seqs * -(-longest // VLLM_BLOCK_TOKENS) + 1) * VLLM_BLOCK_TOKENS * per_token
        kv_cache = min(kv_cache, most)
    return EngineMemory(weights, work, kv_cache, per_token, longest)
