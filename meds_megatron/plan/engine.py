"""Memory of an engine rank: vLLM 0.32 takes `gpu_memory_utilization` of the card, and what its weights, its activations
and its CUDA graphs leave of that is KV cache."""

from dataclasses import dataclass

from meds_megatron.config import Config, ModelShape
from meds_megatron.plan.hardware import GIB, VLLM_BATCH_TOKENS, VLLM_GRAPH_GIB
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


def engine_memory(config: Config, shape: ModelShape, on_gpu: bool) -> EngineMemory:
    """Memory of one rank of an engine.

    Activations of the largest step, after vLLM's profiling run: hidden states, residual and norm, and both halves and
    product of SwiGLU for VLLM_BATCH_TOKENS tokens; logits, their float32 copy and log-softmax for one token of every
    sequence.
    """
    rollout, item = config.rollout, engine_item_bytes(config)
    weights = engine_elements(shape, rollout.tensor) * item
    per_token = 2 * shape.num_layers * max(1, shape.num_kv_heads // rollout.tensor) * shape.head_dim * item
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    tokens = max(VLLM_BATCH_TOKENS, rollout.max_num_seqs) if on_gpu else longest
    work = tokens * item * (4 * shape.hidden_size + 3 * shape.ffn_size // rollout.tensor)
    work += rollout.max_num_seqs * shape.vocab_size * (item + 8)
    if not on_gpu:
        return EngineMemory(weights, work, int(rollout.cpu_kv_cache_gib * GIB), per_token, longest)
    if not rollout.enforce_eager:
        work += int(VLLM_GRAPH_GIB * GIB)
    budget = int(rollout.gpu_memory_utilization * config.cluster.gpu_memory_gib * GIB)
    return EngineMemory(weights, work, budget - weights - work, per_token, longest)
