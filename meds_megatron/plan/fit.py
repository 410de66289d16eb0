"""Whether a run fits, in one sentence, and what to change when it does not."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from meds_megatron.config import Config, ModelShape, ParallelLayout, validate, validate_model
from meds_megatron.errors import UserError
from meds_megatron.plan.activations import longest
from meds_megatron.plan.hardware import GIB, Hardware
from meds_megatron.plan.memory import Demand, Memory, plan_memory

GROUPS = {
    "trainer": ("weights", "gradients", "optimizer"),
    "activations": ("activations", "logits", "fingerprints", "temporary"),
    "engine": ("engine weights", "engine work", "KV cache"),
    "resharding": ("staging", "resharding"),
    "contexts and NCCL": ("contexts",),
}
"""Parts of a demand that a sentence adds up."""
MOST_SUGGESTIONS = 3
MOST_CHANGES = 3

CHOSEN = ("rollout.kv_cache_gib", "train.offload_optimizer")
"""Settings that the plan chooses where they are null."""

Changes = dict[str, Any]


@dataclass(frozen=True)
class Suggestion:
    """Settings with which the run fits."""

    changes: Changes

    def __str__(self) -> str:
        return " ".join(f"{key}={_written(value)}" for key, value in self.changes.items())


def problem(config: Config, memory: Memory) -> str | None:
    """Half a sentence about what does not fit; None if all does."""
    if memory.limit is None:
        return None
    if over := memory.over:
        return _too_much(max(over, key=lambda demand: demand.total), memory.limit)
    engine = memory.engine
    if not engine.full_sequences:
        needed = engine.kv_bytes_per_token * engine.longest
        given = config.rollout.kv_cache_gib
        return (
            f"{'the trainer leaves' if given is None else f'rollout.kv_cache_gib = {given:g} gives'} an engine rank "
            f"{max(engine.kv_cache, 0) / GIB:.1f} GiB of KV cache next to {engine.weights / GIB:.1f} of weights and "
            f"{engine.work / GIB:.1f} of work, less than the {needed / GIB:.1f} of one prompt and response of "
            f"{engine.longest} tokens"
        )
    return None


def sentence(config: Config, memory: Memory, suggestions: list[Suggestion]) -> str:
    """The refusal of a run that does not fit."""
    if suggestions:
        advice = "fits with " + ", or with ".join(map(str, suggestions))
    else:
        advice = "no change of its layout fits these GPUs: give it more nodes or a smaller model"
    return f"the run does not fit: {problem(config, memory)}; {advice}."


def check_fit(config: Config, shape: ModelShape, hardware: Hardware) -> None:
    """Raises UserError, in the words of `meds plan`, for a run that does not fit its GPUs."""
    layout = ParallelLayout.from_config(config)
    memory = plan_memory(config, shape, layout, hardware, on_gpu=True)
    if problem(config, memory):
        raise UserError(sentence(config, memory, suggest(config, shape, hardware)))


def suggest(config: Config, shape: ModelShape, hardware: Hardware) -> list[Suggestion]:
    """Up to MOST_SUGGESTIONS changes with which the run fits, those of the fewest settings, each tried.

    More nodes are tried last.
    """
    for nodes in (1, 2, 4, 8):
        more = {} if nodes == 1 else {"cluster.nodes": config.cluster.nodes * nodes}
        for count in range(MOST_CHANGES + 1):
            found = [
                Suggestion(fitting)
                for changes in _combinations(config, count)
                if (fitting := _fitting(config, shape, hardware, more | changes)) is not None
            ]
            if found:
                found.sort(key=lambda suggestion: len(suggestion.changes))
                fewest = [s for s in found if len(s.changes) == len(found[0].changes)]
                return fewest[:MOST_SUGGESTIONS]
    return []


def _combinations(config: Config, count: int) -> Iterator[Changes]:
    """Changes of `count` settings other than the KV cache, the cheapest in time first."""
    options = _options(config)
    for keys in combinations(options, count):
        for values in product(*(options[key] for key in keys)):
            changes = dict(zip(keys, values, strict=True))
            if changes.get("parallel.pipeline") == 1 and config.parallel.virtual_pipeline > 1:
                changes["parallel.virtual_pipeline"] = 1
            if changes.get("parallel.tensor") == 1 and config.parallel.sequence:
                changes["parallel.sequence"] = False
            yield changes


def _options(config: Config) -> dict[str, list]:
    """The values that a search tries for each setting."""
    parallel, train, rollout = config.parallel, config.train, config.rollout
    gpus = config.cluster.nodes * config.cluster.ranks_per_node
    powers = [2**power for power in range(11)]
    # Micro-batches that have no room for the longest sequence are refused.
    budgets = [2**power for power in range(20, 9, -1)]
    return {
        "train.micro_batch_tokens": [b for b in budgets if longest(config) <= b < train.micro_batch_tokens],
        "train.forward_tokens": [b for b in budgets if longest(config) <= b < train.forward_tokens],
        "parallel.sequence": [True] if parallel.tensor > 1 and not parallel.sequence else [],
        "model.recompute": ["full"] if config.model.recompute != "full" else [],
        "parallel.pipeline": [p for p in powers if p <= gpus and p != parallel.pipeline],
        "parallel.tensor": [p for p in powers if p <= config.cluster.ranks_per_node and p != parallel.tensor],
        "parallel.context": [more * parallel.context for more in (2, 4)],
        "rollout.tensor": [p for p in powers if rollout.tensor < p <= config.cluster.ranks_per_node],
    }


def _fitting(config: Config, shape: ModelShape, hardware: Hardware, changes: Changes) -> Changes | None:
    """The changes, with null for settings that the plan chooses where that is needed; None if the run does not fit."""
    changed = changed_config(config, changes)
    try:
        if changed.rollout.tensor != config.rollout.tensor:
            nodes = changed.rollout.nodes or changed.cluster.nodes
            most = nodes * (changed.cluster.ranks_per_node // changed.rollout.tensor)
            if changed.rollout.engines > most:
                changes = changes | {"rollout.engines": most}
                changed = changed_config(config, changes)
        validate(changed)
        validate_model(changed, shape)
    except UserError:
        return None
    if _fits(changed, shape, hardware):
        return changes
    for keys in (["rollout.kv_cache_gib"], ["train.offload_optimizer"], [*CHOSEN]):
        freed = {key: None for key in keys if _value(changed, key) is not None}
        if freed and _fits(changed_config(changed, freed), shape, hardware):
            return changes | freed
    return None


def _fits(config: Config, shape: ModelShape, hardware: Hardware) -> bool:
    layout = ParallelLayout.from_config(config)
    return problem(config, plan_memory(config, shape, layout, hardware, on_gpu=True)) is None


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def changed_config(config: Config, changes: Changes) -> Config:
    """A copy of the config with dotted keys set."""
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        setattr(getattr(changed, section), name, value)
    return changed


def _too_much(demand: Demand, limit: int) -> str:
    device = demand.device
    groups = {name: sum(demand.parts.get(part, 0) for part in parts) for name, parts in GROUPS.items()}
    terms = " + ".join(f"{size / GIB:.1f} ({name})" for name, size in groups.items() if size)
    return (
        f"in the phase `{demand.phase}`, GPU {device.gpu} of node {device.node} needs {terms} = "
        f"{demand.total / GIB:.1f} GiB of cluster.gpu_memory_gib = {limit / GIB:g}"
    )


def _written(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
