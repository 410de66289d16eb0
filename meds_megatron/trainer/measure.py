"""What the trainer and the memory say of responses: log-probs, recurring mistakes, shaped scores."""

import numpy as np

from meds_megatron.actor.messages import ForwardReply
from meds_megatron.config import PenaltyConfig
from meds_megatron.reward.scores import penalties, shape_scores
from meds_megatron.trainer.batch import Batch
from meds_megatron.trainer.groups import PromptGroup, Sample
from meds_megatron.trainer.memory_keys import key_to_ask
from meds_megatron.trainer.parts import Parts


def measure(groups: list[PromptGroup], parts: Parts) -> None:
    """Writes onto the samples what one forward pass and one lookup find out.

    Of groups that are not trained on, only what the memory may learn from goes through the model.
    """
    asked = _number_rows([sample for group in groups for sample in group.samples], parts)
    replies = _forward(groups, parts)
    with parts.timer("memory"):
        pieces = [reply.pieces for reply in replies]
        sizes_N = parts.memory.lookup([sample.memory_row for sample in asked], pieces)
    _shape(groups, asked, sizes_N, parts.config.penalty)


def _number_rows(samples: list[Sample], parts: Parts) -> list[Sample]:
    """Gives a number to each sample that the memory is asked about; returns these."""
    keys = [key_to_ask(sample, parts.config) for sample in samples]
    asked = [sample for sample, key in zip(samples, keys, strict=True) if key is not None]
    rows = parts.memory.rows([key for key in keys if key is not None])
    for sample, row in zip(asked, rows, strict=True):
        sample.memory_row = row
    return asked


def _forward(groups: list[PromptGroup], parts: Parts) -> list[ForwardReply]:
    """The ranks' replies; their log-probs, and where the fingerprints are, are on the samples."""
    kept = [group for group in groups if group.kept]
    others = [
        sample
        for group in groups
        if not group.kept
        for sample in group.samples
        if sample.memory_row is not None and sample.has_fingerprint
    ]
    batch = Batch.of_groups(kept, parts.config.train.mini_batch_prompts, parts.policy.layout.data, others)
    if not batch.samples:
        return []
    with parts.timer("forward"):
        # The GPUs are the trainer's until the next weights are in the engines, or another batch is generated.
        parts.engines.sleep()
        replies = parts.policy.forward(batch.shards())
        batch.take_forward(replies)
    return replies


def _shape(groups: list[PromptGroup], asked: list[Sample], sizes_N: np.ndarray, config: PenaltyConfig) -> None:
    """Mistakes that recur cost more."""
    for sample, size, penalty in zip(asked, sizes_N, penalties(sizes_N, config.alpha), strict=True):
        sample.cluster_size, sample.penalty = int(size), float(penalty)
    samples = [sample for group in groups for sample in group.samples]
    shaped_B = shape_scores(
        np.array([sample.score for sample in samples]),
        np.array([sample.grade.correct for sample in samples], dtype=bool),
        np.array([sample.penalty for sample in samples]),
        config.target,
    )
    for sample, shaped in zip(samples, shaped_B, strict=True):
        sample.shaped_score = float(shaped)
