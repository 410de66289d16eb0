"""Settings that may differ when a run resumes, and those that make it another run."""

from collections.abc import Container, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from meds_megatron.config.schema import Config

FREE_TO_CHANGE = {
    "name",
    "run_dir",
    "cache_dir",
    "model.recompute",
    "cluster",
    "parallel",
    "data.validation",
    "data.limit_validation",
    "rollout.engines",
    "rollout.tensor",
    "rollout.nodes",
    "rollout.max_failures",
    "rollout.validation_temperature",
    "rollout.validation_top_p",
    "rollout.validation_responses",
    "rollout.kv_cache_gib",
    "rollout.threads",
    "rollout.max_num_seqs",
    "rollout.enforce_eager",
    "rollout.on_update",
    "reward.workers",
    "memory.budget_gib",
    "memory.skip_damaged",
    "train.steps",
    "train.micro_batch_tokens",
    "train.forward_tokens",
    "train.offload_optimizer",
    "train.validate_every",
    "train.export_every",
    "train.export_hf",
    "train.save_rollouts",
    "checkpoint",
    "faults",
    "sync",
    "wandb",
}
"""Keys, or whole sections, that change where, how fast or how long a run computes and what it writes. All others change
what is learned."""


def changes(saved: Config, present: Config) -> tuple[list[str], list[str]]:
    """`key: old -> new` of every setting that differs: those free to change, and those that make it another run."""
    old, new = settings_of(saved), settings_of(present)
    free: list[str] = []
    other: list[str] = []
    for key, value in new.items():
        if old[key] != value:
            kind = free if is_free_to_change(key) else other
            kind.append(f"{key}: {old[key]} -> {value}")
    return free, other


def make_another_run(saved: Config, planned: Config, also: Container[str] = ()) -> list[str]:
    """`key: old -> new` of the settings that make a config another run than the saved one, and of the keys `also`. A
    setting that the config leaves open (`auto`) is as the run has chosen it."""
    old = settings_of(saved)
    return [
        f"{key}: {old[key]} -> {value}"
        for key, value in settings_of(planned).items()
        if value not in (old[key], "auto") and (key in also or not is_free_to_change(key))
    ]


def settings_of(config: Config) -> dict[str, Any]:
    """The value of every setting by its dotted key."""
    return dict(_leaves(config))


def is_free_to_change(key: str) -> bool:
    """Whether the key, or a section that it is in, is free to change."""
    parts = key.split(".")
    return any(".".join(parts[: end + 1]) in FREE_TO_CHANGE for end in range(len(parts)))


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
