"""Settings of a run: the typed schema, reading, writing and judging them. Imports no torch."""

from meds_megatron.config.layout import ModelSizes, ParallelLayout, RankCoordinates
from meds_megatron.config.load import load_config, save_config
from meds_megatron.config.schema import (
    AdvantageConfig,
    ClusterConfig,
    Config,
    DataConfig,
    FilterConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    OverlongConfig,
    ParallelConfig,
    PenaltyConfig,
    PolicyConfig,
    RandomModelConfig,
    RewardConfig,
    RolloutConfig,
    SyncConfig,
    TrainConfig,
    WandbConfig,
)
from meds_megatron.config.validate import validate, validate_model

__all__ = [
    "AdvantageConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "FilterConfig",
    "MemoryConfig",
    "ModelConfig",
    "ModelSizes",
    "OptimizerConfig",
    "OverlongConfig",
    "ParallelConfig",
    "ParallelLayout",
    "PenaltyConfig",
    "PolicyConfig",
    "RandomModelConfig",
    "RankCoordinates",
    "RewardConfig",
    "RolloutConfig",
    "SyncConfig",
    "TrainConfig",
    "WandbConfig",
    "load_config",
    "save_config",
    "validate",
    "validate_model",
]
