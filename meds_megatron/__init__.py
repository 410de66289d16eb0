"""Reinforcement learning of Qwen models with a memory of past mistakes (MEDS), on megatron-core and vLLM."""
