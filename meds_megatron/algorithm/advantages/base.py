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
    answers_B: Tensor | None = None
    """Any integer per normalised final answer; only `error_diversity` needs it."""
    counts_B: Tensor | None = None
    """int64: earlier responses in the same cluster of the memory, -1 where a response was not looked up; only
    `count_bonus` needs it."""


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


def sum_groups(values_B: Tensor, index_B: Tensor, groups: int) -> Tensor:
    """Sums [G] of the values of each group; `index_B` are the groups' numbers from 0 on."""
    return values_B.new_zeros(groups).index_add(0, index_B, values_B)
