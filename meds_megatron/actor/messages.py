"""What driver and trainer ranks tell each other. Importing this needs neither torch nor megatron-core."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks meet, and which of them this one is."""

    host: str
    port: int
    rank: int
    world_size: int
    timeout_minutes: int = 30


@dataclass
class ForwardResult:
    """What the forward pass of a data-parallel rank's responses found."""

    logprobs_R: np.ndarray
    entropy_R: np.ndarray
    fingerprints_BL: np.ndarray


@dataclass
class UpdateResult:
    """One optimizer step: metric sums over this data-parallel rank's tokens, and the whole model's gradient norm."""

    sums: dict[str, float]
    grad_norm: float
    learning_rate: float
