"""Advantages: one a response, from the scores of its group (on the driver), then one a token (on the ranks).

A new estimator or shaper is a file here and a line in one of the two functions below. What it needs to know of the
responses is a field of `AdvantageInputs` (or of `LossInputs`, for tokens).
"""

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput, TokenAdvantageOutput
from meds_megatron.algorithm.advantages.entropy import entropy_shaped
from meds_megatron.algorithm.advantages.group import group_relative
from meds_megatron.algorithm.losses import LossInputs
from meds_megatron.config import AdvantageConfig


def compute_advantages(inputs: AdvantageInputs, config: AdvantageConfig) -> AdvantageOutput:
    """One advantage a response."""
    return group_relative(inputs, config)


def shape_token_advantages(inputs: LossInputs, config: AdvantageConfig) -> TokenAdvantageOutput:
    """The advantages of `inputs`, which are their responses', changed token by token as the config chooses."""
    if config.entropy_coefficient == 0.0:
        return TokenAdvantageOutput(inputs.advantages_T)
    return entropy_shaped(inputs, config)


__all__ = [
    "AdvantageInputs",
    "AdvantageOutput",
    "TokenAdvantageOutput",
    "compute_advantages",
    "shape_token_advantages",
]
