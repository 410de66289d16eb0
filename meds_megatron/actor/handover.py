"""Fingerprints leave the rank that made them: straight to the memory shards, past the driver."""

import numpy as np

from meds_megatron.actor.messages import FingerprintPiece, ForwardReply, ForwardResult
from meds_megatron.actor.step_data import StepData


def hand_over(result: ForwardResult, data: StepData) -> ForwardReply:
    """Puts the fingerprints into this machine's object store, cut by shard; the driver gets references to pass on."""
    import ray

    pieces = cut_by_shard(result.fingerprints_BL, data)
    return ForwardReply(
        logprobs_R=result.logprobs_R,
        entropy_R=result.entropy_R,
        fingerprints_BL=ray.put(result.fingerprints_BL),
        pieces={shard: ray.put(piece) for shard, piece in pieces.items()},
    )


def cut_by_shard(fingerprints_BL: np.ndarray, data: StepData) -> dict[int, FingerprintPiece]:
    """The part of every memory shard that owns some of a rank's responses; nothing for the others."""
    shards = np.unique(data.memory_shards_B[data.memory_shards_B >= 0])
    owned = {int(shard): np.flatnonzero(data.memory_shards_B == shard) for shard in shards}
    return {shard: FingerprintPiece(data.memory_rows_B[rows], fingerprints_BL[rows]) for shard, rows in owned.items()}
