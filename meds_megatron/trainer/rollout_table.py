"""The responses of a step as columns of its rollout file."""

from typing import Any

import numpy as np

from meds_megatron.trainer.error_memory import memory_key
from meds_megatron.trainer.rollout_batch import RolloutBatch


def rollout_columns(rollouts: RolloutBatch, advantages_K: np.ndarray) -> dict[str, Any]:
    """A row for every response of the step; `advantages_K` are those of the ones that are trained on.

    None stands for what a response does not have: scores where its grading failed (`outcome` is timeout or error, and
    `correct` means nothing), penalty and shaped score where its group is neither kept nor remembered, a fingerprint
    where no answer went through the model, an advantage where it is not trained on.
    """
    samples, batch = rollouts.samples, rollouts.batch
    completions = [sample.completion for sample in samples]
    version_changes = [completion.version_changes for completion in completions]
    advantages_B = np.full(len(batch), np.nan)
    advantages_B[rollouts.trained_B] = advantages_K
    scored_B = np.isfinite(batch.shaped_scores_B)
    looked_up_B = scored_B & rollouts.looked_up_B
    # A batch without a forward pass has fingerprints of no layers.
    has_fingerprint_B = np.isfinite(batch.fingerprints_BL[:, :1]).any(axis=1)
    return {
        "key": [memory_key(sample) for sample in samples],
        "group": batch.groups_B,
        "source": [sample.prompt.problem.source for sample in samples],
        "prompt": [sample.prompt.problem.question for sample in samples],
        "answer": [sample.prompt.problem.answer for sample in samples],
        "response": [completion.text for completion in completions],
        "response_token_ids": [completion.token_ids_S for completion in completions],
        "given_tokens": [np.flatnonzero(~completion.loss_mask_S) for completion in completions],
        "prompt_tokens": batch.prompt_lengths_B,
        "response_tokens": batch.response_lengths_B,
        "correct": batch.correct_B,
        "outcome": [sample.grade.outcome for sample in samples],
        "score": _where(rollouts.graded_B, batch.scores_B),
        "penalty": _where(scored_B, batch.penalties_B),
        "cluster_size": _where(scored_B, batch.cluster_sizes_B),
        "cluster_label": _where(looked_up_B, batch.cluster_labels_B),
        "shaped_score": _where(scored_B, batch.shaped_scores_B),
        "advantage": _where(rollouts.trained_B, advantages_B),
        "fingerprint": _where(has_fingerprint_B, batch.fingerprints_BL),
        "policy_version": [changes[0][0] for changes in version_changes],
        "later_versions": [list(map(list, changes[1:])) for changes in version_changes],
        "kept": rollouts.kept_B,
    }


def _where(present_B: np.ndarray, values_B: np.ndarray) -> list:
    """The values, None where one is not present."""
    return [value if present else None for value, present in zip(values_B, present_B, strict=True)]
