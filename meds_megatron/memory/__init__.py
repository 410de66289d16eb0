"""The error memory: fingerprints of past errors by key, clustered. Imports neither torch nor ray."""

from typing import TYPE_CHECKING, Any

from meds_megatron.memory.match import UNKNOWN, Match, shard_of
from meds_megatron.memory.statistics import step_metrics

if TYPE_CHECKING:
    from meds_megatron.memory.shard import MemoryShard
    from meds_megatron.memory.snapshot import DamagedError

__all__ = ["UNKNOWN", "DamagedError", "Match", "MemoryShard", "shard_of", "step_metrics"]


def __getattr__(name: str) -> Any:
    """Imports on demand what needs numba: a process that only calls shards in other processes does without it."""
    if name == "MemoryShard":
        from meds_megatron.memory.shard import MemoryShard

        return MemoryShard
    if name == "DamagedError":
        from meds_megatron.memory.snapshot import DamagedError

        return DamagedError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
