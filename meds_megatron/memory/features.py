"""From a fingerprint, one logit a layer, to the vector that the memory compares."""

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError


def features_of(fingerprints_NL: np.ndarray, config: MemoryConfig) -> np.ndarray:
    """The last layers of each fingerprint, [N, L] -> [N, F] float32 with F <= last_n_layers.

    With `layer_diff` the differences of neighbouring layers are taken first, so they number L - 1. An answer that has
    no fingerprint comes as one of no layers (L = 0), and has no features.
    Raises UserError for a value that is not finite, and when no layer is left.
    """
    fingerprints_NL = np.asarray(fingerprints_NL, dtype=np.float32)
    if fingerprints_NL.ndim != 2:
        raise UserError(f"Fingerprints must be an array [responses, layers], not of shape {fingerprints_NL.shape}.")
    if fingerprints_NL.shape[1] == 0:
        return fingerprints_NL
    layers_NL = np.diff(fingerprints_NL, axis=1) if config.layer_diff else fingerprints_NL
    features_NF = np.ascontiguousarray(layers_NL[:, -config.last_n_layers :])
    if features_NF.shape[1] == 0:
        raise UserError(
            f"Fingerprints of {fingerprints_NL.shape[1]} layer(s) leave nothing to compare with "
            f"memory.last_n_layers={config.last_n_layers} and memory.layer_diff={config.layer_diff}."
        )
    finite_N = np.isfinite(features_NF).all(axis=1)
    if not finite_N.all():
        raise UserError(
            f"Fingerprint {int(np.argmin(finite_N))} of {len(finite_N)} holds a value that is not finite: "
            "look for an overflow in the model's logits."
        )
    return features_NF


def unit_vectors(features_NF: np.ndarray) -> np.ndarray:
    """L2-normalised rows as float64; a zero row stays zero, so its cosine with anything is 0."""
    points_NF = np.ascontiguousarray(features_NF, dtype=np.float64)
    norms_N1 = np.linalg.norm(points_NF, axis=1, keepdims=True)
    norms_N1[norms_N1 == 0.0] = 1.0
    return points_NF / norms_N1


def check_settings(config: MemoryConfig) -> None:
    """Raises UserError for a setting of the memory that means nothing."""
    choices = {
        "method": ("hdbscan", "single"),
        "noise": ("cluster", "ignore"),
        "no_answer": ("escape", "own_cluster"),
    }
    for name, known in choices.items():
        value = getattr(config, name)
        if value not in known:
            raise UserError(f"memory.{name} is {value!r}: it must be one of {', '.join(known)}.")
    least = {"min_cluster_size": 2, "min_samples": 1, "knn": 1, "last_n_layers": 1, "window": 1}
    for name, lowest in least.items():
        value = getattr(config, name)
        if value is not None and value < lowest:
            raise UserError(f"memory.{name} is {value}: it must be at least {lowest}.")
    for name in ("half_life_steps", "budget_gib"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"memory.{name} is {value}: it must be positive, or null.")
