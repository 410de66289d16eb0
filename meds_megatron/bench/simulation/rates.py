"""Seconds that simulated engines and ranks need for their work, from the assumptions of `meds plan`."""

from dataclasses import dataclass

from meds_megatron.plan.duration import copy_seconds
from meds_megatron.plan.plan import Plan


@dataclass(frozen=True)
class EngineRates:
    """One engine. A decode step reads the weights and the KV cache of its sequences while it computes their products;
    the slower of both counts."""

    step_seconds: float
    """Seconds of every decode step, in addition: scheduler, sampler, launches, collectives."""
    weight_seconds: float
    """Seconds to read all weights."""
    cached_seconds: float
    """Seconds to read the KV cache of one token."""
    product_seconds: float
    """Seconds of the products of one token with the weights."""
    attention_seconds: float
    """Seconds of the products of one token with one cached token; half of them in a prefill, whose mask is causal."""
    kv_tokens: int
    """Tokens that the KV cache holds."""
    max_num_seqs: int
    start_seconds: float = 60.0
    """Seconds to start or restart an engine."""

    def decode_seconds(self, sequences: int, cached: float) -> float:
        """Seconds of a decode step of `sequences` sequences whose KV caches together hold `cached` tokens."""
        read = self.weight_seconds + cached * self.cached_seconds
        products = sequences * self.product_seconds + cached * self.attention_seconds
        return max(read, products) + self.step_seconds

    def prefill_seconds(self, tokens: int, length: int) -> float:
        """Seconds to compute the KV cache of `tokens` tokens of a sequence of `length`."""
        return tokens * (self.product_seconds + length * self.attention_seconds / 2)


@dataclass(frozen=True)
class TrainerRates:
    """All trainer ranks together."""

    forward_seconds: float
    """Forward pass, for each token of prompts and responses."""
    update_seconds: float
    """Forward and backward pass and optimizer, for each token."""
    sync_seconds: float
    """Transfer of the weights to all engines, which do not generate meanwhile."""
    copy_seconds: float = 0.0
    """Copies between the memories of GPUs and hosts in a step, where engines and ranks share the GPUs."""
    grading_seconds: float = 0.0
    """Seconds from a response to its grade."""


def rates_of(plan: Plan, grading_seconds: float) -> tuple[EngineRates, TrainerRates]:
    """Rates of a planned run: those of `plan.duration`, which names the sources of the formulas, for each decode step
    and for each token of the training."""
    hardware, shape, rollout, engine = plan.hardware, plan.shape, plan.config.rollout, plan.memory.engine
    reads = hardware.memory_gbyte * 1e9 * hardware.memory_efficiency
    operations = rollout.tensor * hardware.tflops * 1e12 * hardware.efficiency
    collectives = 2 * shape.num_layers * hardware.collective_us * 1e-6 if rollout.tensor > 1 else 0.0
    first, second = shape.token_operations(0), shape.token_operations(1)
    engine_rates = EngineRates(
        step_seconds=collectives + hardware.decode_step_ms * 1e-3,
        weight_seconds=engine.weights / reads,
        cached_seconds=engine.kv_bytes_per_token / reads,
        product_seconds=first / operations,
        # `token_operations` halves them for the mask.
        attention_seconds=2 * (second - first) / operations,
        kv_tokens=max(engine.kv_cache, 0) // engine.kv_bytes_per_token,
        max_num_seqs=rollout.max_num_seqs,
    )
    trainer_rates = TrainerRates(
        forward_seconds=plan.seconds["forward"] / plan.tokens.trained_tokens,
        update_seconds=plan.seconds["update"] / plan.tokens.trained_tokens,
        sync_seconds=plan.traffic.weights.seconds,
        copy_seconds=copy_seconds(plan.config, hardware, plan.tokens, plan.memory),
        grading_seconds=grading_seconds,
    )
    return engine_rates, trainer_rates
