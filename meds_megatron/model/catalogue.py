"""The sizes of the Qwen models that can be trained, for plans and benchmarks that have no model directory.

A run reads its model's own config.json instead. Source: the config.json of each model on Hugging Face.
"""

from meds_megatron.model.shape import ModelShape


def _qwen2(
    hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, tied: bool
) -> ModelShape:
    return ModelShape("qwen2", hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied, 1e6, 1e-6, 32768)


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> ModelShape:
    return ModelShape("qwen3", hidden, layers, heads, kv_heads, 128, ffn, 151936, tied, 1e6, 1e-6, 40960)


QWEN = {
    "Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 128, 8960, 151936, True),
    "Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 128, 11008, 151936, True),
    "Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 128, 18944, 152064, False),
    "Qwen2.5-14B": _qwen2(5120, 48, 40, 8, 128, 13824, 152064, False),
    "Qwen2.5-32B": _qwen2(5120, 64, 40, 8, 128, 27648, 152064, False),
    "Qwen2.5-72B": _qwen2(8192, 80, 64, 8, 128, 29568, 152064, False),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408, False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600, False),
}
