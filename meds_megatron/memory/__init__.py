"""The error memory: fingerprints of past errors by key, clustered. Imports neither torch nor ray."""

from meds_megatron.memory.shard import UNKNOWN, Match, MemoryShard, shard_of
from meds_megatron.memory.snapshot import DamagedError
from meds_megatron.memory.statistics import step_metrics

__all__ = ["UNKNOWN", "DamagedError", "Match", "MemoryShard", "shard_of", "step_metrics"]
