"""Settings that a config leaves open (null or `auto`): whether the optimizer's state leaves the GPUs while engines
generate, the size of the KV cache, and the correction of stale responses."""

import copy

from meds_megatron.config import Config, ModelShape, ParallelLayout
from meds_megatron.plan.duration import StepTokens, copy_seconds, rollout_seconds, step_tokens
from meds_megatron.plan.fit import problem
from meds_megatron.plan.hardware import GIB, Hardware, Workload
from meds_megatron.plan.memory import plan_memory

STEP_MIB = 2**20
"""The KV cache is a whole number of MiB, so that the saved config holds it exactly."""


def with_choices(
    config: Config, shape: ModelShape, hardware: Hardware, on_gpu: bool, tokens: StepTokens | None = None
) -> Config:
    """A copy of the config without null and `auto` in these settings, except a KV cache for which there is no room.
    `tokens` are those of a step, by default the assumed ones."""
    config = copy.deepcopy(config)
    if config.policy.importance == "auto":
        config.policy.importance = "token" if config.train.max_staleness > 0 else "none"
    if config.train.offload_optimizer is None:
        config.train.offload_optimizer = _offload_pays(config, shape, hardware, on_gpu, tokens)
    layout = ParallelLayout.from_config(config)
    kv_cache = plan_memory(config, shape, layout, hardware, on_gpu).engine.kv_cache // STEP_MIB
    if config.rollout.kv_cache_gib is None and kv_cache > 0:
        config.rollout.kv_cache_gib = kv_cache * STEP_MIB / GIB
    return config


def _offload_pays(
    config: Config, shape: ModelShape, hardware: Hardware, on_gpu: bool, tokens: StepTokens | None
) -> bool:
    """Whether a step is expected to be faster so, or the run does not fit otherwise."""
    if not on_gpu or config.rollout.nodes is not None:
        return False
    layout, tokens = ParallelLayout.from_config(config), tokens or step_tokens(config, Workload())
    seconds = {}
    for offload in (False, True):
        config.train.offload_optimizer = offload
        memory = plan_memory(config, shape, layout, hardware, on_gpu)
        if problem(config, memory) is None:
            seconds[offload] = rollout_seconds(config, shape, hardware, tokens, memory)
            seconds[offload] += copy_seconds(config, hardware, tokens, memory)
    # What fits without it fits with it.
    return False not in seconds or seconds[True] < seconds[False]
