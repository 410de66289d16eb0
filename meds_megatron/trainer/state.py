"""What a run is besides its weights: the one object that has to survive a restart."""

from dataclasses import dataclass

from meds_megatron.data.sampler import PromptSampler


@dataclass
class RunState:
    """Owned by the driver's loop; nothing else changes it."""

    sampler: PromptSampler
    step: int = 0
    """Training steps done."""
    weights_version: int = 0
    """Of the weights that the engines have; the number of updates they went through."""
    prompts_seen: int = 0
    tokens_seen: int = 0
    """Response tokens trained on."""
