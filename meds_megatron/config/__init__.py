"""Typed settings of a run: schema, loading, validation, parallel layout and model shape. Imports no torch."""

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.load import load_config, save_config
from meds_megatron.config.model_shape import QWEN, ModelShape
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
