"""The memory of past mistakes: fingerprints by key, clustered. Imports neither torch nor ray."""

from meds_megatron.memory.routing import shard_of
from meds_megatron.memory.segments import DamagedError
from meds_megatron.memory.shard import UNKNOWN, Match, MemoryShard
from meds_megatron.memory.statistics import step_metrics

__all__ = ["UNKNOWN", "DamagedError", "Match", "MemoryShard", "shard_of", "step_metrics"]
