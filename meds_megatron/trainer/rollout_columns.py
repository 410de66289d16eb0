"""The responses of a step as columns of its rollout file."""

import numpy as np
import ray

from meds_megatron.trainer.groups import PromptGroup, Sample
from meds_megatron.trainer.memory_keys import memory_key


def rollout_columns(groups: list[PromptGroup]) -> dict[str, list]:
    """A row for every response of the step; what was not measured of it, and what only trained ones have, is None."""
    fingerprints = _fetch([sample for group in groups for sample in group.samples])
    rows = []
    for number, group in enumerate(groups):
        for sample in group.samples:
            rows.append(
                {"group": number, "kept": group.kept, "fingerprint": fingerprints.get(id(sample))}
                | _generated(sample)
                | _measured(sample)
            )
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def _fetch(samples: list[Sample]) -> dict[int, np.ndarray]:
    """Fingerprints by the identity of their sample, from the ranks that made them."""
    stored = {id(sample): sample.fingerprint for sample in samples if sample.fingerprint is not None}
    references = list({fingerprint.array for fingerprint in stored.values()})
    arrays = dict(zip(references, ray.get(references), strict=True))
    return {sample: arrays[fingerprint.array][fingerprint.row] for sample, fingerprint in stored.items()}


def _generated(sample: Sample) -> dict:
    response, grade = sample.response, sample.grade
    return {
        "key": memory_key(sample),
        "prompt": sample.prompt.problem.question,
        "answer": sample.prompt.problem.answer,
        "response": response.text,
        "prompt_tokens": len(sample.prompt.token_ids),
        "response_tokens": len(response.token_ids),
        "correct": grade.correct,
        "outcome": grade.outcome,
        "score": sample.score,
        "weights_version": response.weights_version,
    }


def _measured(sample: Sample) -> dict:
    if sample.shaped_score is None:
        return dict.fromkeys(("penalty", "cluster_size", "shaped_score", "advantage"))
    return {
        "penalty": sample.penalty,
        "cluster_size": sample.cluster_size,
        "shaped_score": sample.shaped_score,
        "advantage": sample.advantage,
    }
