"""Inputs and outputs of everything that makes or changes advantages."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class AdvantageInputs:
    """B responses of any number of groups, in any order."""

    scores_B: Tensor
    """Scores after all penalties."""
    correct_B: Tensor
    """Whether the answer is right (bool)."""
    groups_B: Tensor
    """Any integer per prompt."""


@dataclass(frozen=True)
class AdvantageOutput:
    advantages_B: Tensor
    metrics: dict[str, float] = field(default_factory=dict)
    """Reported as `advantage/<name>`."""


@dataclass(frozen=True)
class TokenAdvantageOutput:
    advantages_T: Tensor
    token_sums: dict[str, Tensor] = field(default_factory=dict)
    """Reported like `LossOutput.token_sums`, together with them."""
