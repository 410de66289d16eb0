"""Advantages: one a response, from the scores of its group (on the driver), then one a token (on the ranks).

A new estimator or shaper is a file here and a line in ESTIMATORS or in one of the two functions below; an estimator may
also be in a file of the user's own, which the config names. What it needs to know of the
responses is a field of `AdvantageInputs` (or of `LossInputs`, for tokens).
"""

from meds_megatron.algorithm.advantages.base import AdvantageInputs, AdvantageOutput, TokenAdvantageOutput
from meds_megatron.algorithm.advantages.count_bonus import count_bonus
from meds_megatron.algorithm.advantages.entropy import entropy_shaped
from meds_megatron.algorithm.advantages.error_diversity import error_diversity
from meds_megatron.algorithm.advantages.focal import focal_weighted
from meds_megatron.algorithm.advantages.group import group_relative
from meds_megatron.algorithm.advantages.pass_at_k import pass_at_k
from meds_megatron.algorithm.losses import LossInputs
from meds_megatron.config import AdvantageConfig
from meds_megatron.user_functions import is_function, load_function

ESTIMATORS = {"group": group_relative, "pass_at_k": pass_at_k}


def compute_advantages(inputs: AdvantageInputs, config: AdvantageConfig) -> AdvantageOutput:
    """One advantage a response: the estimator's, changed by the shapers that are on."""
    if is_function(config.estimator):
        output = load_function("advantage.estimator", config.estimator)(inputs, config)
    else:
        output = ESTIMATORS[config.estimator](inputs, config)
    shapers = {
        focal_weighted: config.focal_gamma > 0,
        error_diversity: config.shapes_by_answer,
        count_bonus: config.count_coefficient > 0,
    }
    for shape, is_on in shapers.items():
        if is_on:
            shaped = shape(inputs, output.advantages_B, config)
            output = AdvantageOutput(shaped.advantages_B, output.metrics | shaped.metrics)
    return output


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
