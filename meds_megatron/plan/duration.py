"""Time of a step by phase, from stated assumptions (`plan.hardware`): an estimate to compare layouts by.

The backward pass costs twice the operations of the forward pass (Megatron-LM, arXiv 2104.04473, section 5.1; its fourth
pass, the recomputation, only where that is on). A pipeline of p stages and v chunks idles (p - 1) / (v m) of the
time of m micro-batches (same paper, section 2.2). Decoding reads all weights and the KV cache of its sequences once a
step ("Efficiently Scaling Transformer Inference", arXiv 2211.05102, section 2). Within a phase
nothing is assumed to overlap.
"""

from dataclasses import dataclass

from meds_megatron.config import Config, ModelShape, ParallelLayout
from meds_megatron.plan.activations import micro_batches
from meds_megatron.plan.hardware import Hardware, Workload
from meds_megatron.plan.memory import Memory
from meds_megatron.plan.network import StepTraffic

TIMED = ("rollout", "forward", "update", "sync")
"""Phases as `time/...` of a run's metrics names them. Grading and the memory overlap with others, or are small."""


@dataclass(frozen=True)
class StepTokens:
    """Responses and tokens of a step, all ranks and engines together."""

    generated: float
    """Responses generated."""
    trained: float
    """Responses trained on."""
    prompt: float
    """Mean length of a prompt."""
    response: float
    """Mean length of a response."""

    @property
    def trained_tokens(self) -> float:
        return self.trained * (self.prompt + self.response)


def step_tokens(config: Config, workload: Workload) -> StepTokens:
    """Assumed tokens of a step. Generation batches are whole: as many as `workload.kept_share` makes necessary."""
    rollout, prompts = config.rollout, config.train.prompts_per_step
    batch = config.filter.generation_prompts or prompts
    kept = 1.0 if config.filter.metric == "none" else workload.kept_share
    batches = min(config.filter.max_batches, -(-prompts // (batch * kept)))
    return StepTokens(
        generated=batches * batch * rollout.responses_per_prompt,
        trained=min(prompts, batches * batch * kept) * rollout.responses_per_prompt,
        prompt=workload.mean_prompt_share * rollout.max_prompt_tokens,
        response=workload.mean_response_share * rollout.max_response_tokens,
    )


def step_seconds(
    config: Config,
    shape: ModelShape,
    layout: ParallelLayout,
    hardware: Hardware,
    tokens: StepTokens,
    memory: Memory,
    traffic: StepTraffic,
) -> dict[str, float]:
    """Seconds of each of TIMED in a step, without calibration."""
    length = tokens.prompt + tokens.response
    compute = tokens.trained_tokens * shape.token_operations(length)
    compute /= layout.ranks * hardware.tflops * 1e12 * hardware.efficiency
    bubble = 1 + (layout.pipeline - 1) / (layout.virtual * micro_batches(config, layout, length))
    local = 1e9 * hardware.local_gbyte
    # A node's devices share its network.
    across = hardware.network_gbit / 8 * 1e9 / config.cluster.ranks_per_node
    pipeline = across if traffic.pipeline_crosses else local
    data = across if traffic.data_crosses else local
    context = across if traffic.context_crosses else local
    passes = 4 if config.model.recompute == "full" else 3
    updates = -(-config.train.prompts_per_step // config.train.mini_batch_prompts)
    optimizer = updates * _state_bytes(memory) / (hardware.memory_gbyte * 1e9 * hardware.memory_efficiency)
    return {
        "rollout": rollout_seconds(config, shape, hardware, tokens, memory),
        "forward": bubble * (compute + traffic.tensor_forward / local + traffic.context_forward / context)
        + traffic.pipeline_forward / pipeline,
        "update": bubble * (passes * compute + traffic.tensor_update / local + traffic.context_update / context)
        + traffic.pipeline_update / pipeline
        + (traffic.data + traffic.tied) / data
        + optimizer,
        "sync": traffic.weights.seconds + copy_seconds(config, hardware, tokens, memory),
    }


def rollout_seconds(config: Config, shape: ModelShape, hardware: Hardware, tokens: StepTokens, memory: Memory) -> float:
    """Time of the engines: each prompt is read once, and its responses are decoded as many at a time as
    `rollout.max_num_seqs` and the KV cache allow; at the end the longest response is decoded almost alone."""
    rollout, engine = config.rollout, memory.engine
    mine = tokens.generated / rollout.engines
    context = tokens.prompt + tokens.response / 2
    cached = max(engine.kv_cache, 0) / (engine.kv_bytes_per_token * (tokens.prompt + tokens.response))
    together = max(1.0, min(rollout.max_num_seqs, mine, cached))
    prefill = mine / rollout.responses_per_prompt * tokens.prompt * shape.token_operations(tokens.prompt)
    prefill /= rollout.tensor * hardware.tflops * 1e12 * hardware.efficiency

    def step(sequences: float) -> float:
        read = engine.weights + sequences * context * engine.kv_bytes_per_token
        products = sequences * shape.token_operations(context) / rollout.tensor
        collectives = 2 * shape.num_layers * hardware.collective_us * 1e-6 if rollout.tensor > 1 else 0
        return (
            max(
                read / (hardware.memory_gbyte * 1e9 * hardware.memory_efficiency),
                products / (hardware.tflops * 1e12 * hardware.efficiency),
            )
            + collectives
            + hardware.decode_step_ms * 1e-3
        )

    tail = rollout.max_response_tokens - tokens.response
    return prefill + mine * tokens.response / together * step(together) + tail * step(together / 8)


def _state_bytes(memory: Memory) -> int:
    """Bytes that an optimizer step reads and writes on a rank, about twice what it holds."""
    held = ("weights", "gradients", "optimizer")
    return max(2 * sum(d.parts.get(name, 0) for name in held) for d in memory.demands if d.device.stage is not None)


def copy_seconds(config: Config, hardware: Hardware, tokens: StepTokens, memory: Memory) -> float:
    """Copies to the host's memory and back where engines and trainer share GPUs: of the optimizer's state once a step,
    and of the engines' weights at each generation batch whose filter needs a forward pass."""
    if memory.limit is None or config.rollout.nodes is not None:
        return 0.0
    copied = 0.0
    if config.train.offload_optimizer:
        copied += max(demand.parts.get("optimizer", 0) for demand in memory.demands)
    if config.filter.metric == "shaped":
        batch = config.filter.generation_prompts or config.train.prompts_per_step
        copied += memory.engine.weights * tokens.generated / (batch * config.rollout.responses_per_prompt)
    return 2 * copied / (hardware.host_gbyte * 1e9)
