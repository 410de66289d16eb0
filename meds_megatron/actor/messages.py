"""What driver and trainer ranks tell each other. Importing this needs neither torch nor megatron-core."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ray import ObjectRef


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


@dataclass(frozen=True)
class FingerprintPiece:
    """The fingerprints [N, L] that a rank made for one memory shard, with the step-wide numbers of their responses."""

    rows_N: np.ndarray
    fingerprints_NL: np.ndarray


@dataclass(frozen=True)
class ForwardReply:
    """A ForwardResult as the driver gets it: the fingerprints stay where they were made, for those who need them."""

    logprobs_R: np.ndarray
    entropy_R: np.ndarray
    fingerprints_BL: "ObjectRef"
    pieces: dict[int, "ObjectRef"]
    """A FingerprintPiece for each memory shard that owns some of the responses."""


@dataclass
class UpdateResult:
    """One optimizer step: metric sums over this data-parallel rank's tokens, and the whole model's gradient norm."""

    sums: dict[str, float]
    grad_norm: float
    learning_rate: float
