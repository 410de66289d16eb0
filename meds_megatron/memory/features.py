"""Feature vectors of the memory, made from fingerprints (one logit a layer) or from final answers."""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError

CODE_BITS = 20
"""Bits of an answer's hash in each value of its code: float32 holds whole numbers of up to 24 bits exactly."""
CODE_VALUES = 3


def answer_codes(answers: Sequence[str]) -> np.ndarray:
    """Codes [N, CODE_VALUES] float32 of normalised final answers, which take the place of fingerprints with `method:
    answer`: equal for equal answers, by a hash of 60 bits, in every process and run."""
    codes_NC = np.empty((len(answers), CODE_VALUES), np.float32)
    for row, answer in enumerate(answers):
        digest = int.from_bytes(hashlib.blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        codes_NC[row] = [(digest >> (CODE_BITS * place)) % 2**CODE_BITS for place in range(CODE_VALUES)]
    return codes_NC


def features_of(fingerprints_NL: np.ndarray, config: MemoryConfig) -> np.ndarray:
    """The last layers of each fingerprint, [N, L] -> [N, F] float32 with F <= last_n_layers.

    With `layer_diff` the differences of neighbouring layers are taken first, so they number L - 1. A response without
    an answer has a fingerprint of no layers (L = 0) and no features. Codes of answers (`method: answer`) stay whole.
    Raises UserError for a value that is not finite, and when no layer is left.
    """
    fingerprints_NL = np.asarray(fingerprints_NL, dtype=np.float32)
    if fingerprints_NL.ndim != 2:
        raise UserError(f"Fingerprints must be an array [responses, layers], not of shape {fingerprints_NL.shape}.")
    if fingerprints_NL.shape[1] == 0 or config.method == "answer":
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
    """Raises UserError for a choice that the schema does not list and for a number out of range; the memory is also
    used without the checks of a whole config."""
    for name, kind in get_type_hints(MemoryConfig).items():
        value, choices = getattr(config, name), get_args(kind)
        if get_origin(kind) is Literal and value not in choices:
            raise UserError(f"memory.{name} is {value!r}: it must be one of {', '.join(choices)}.")
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
            raise UserError(f"memory.{name} is {value}: it must be positive.")
    if config.min_cluster_size < 2:
        raise UserError(f"memory.min_cluster_size is {config.min_cluster_size}: it must be at least 2.")
    if config.novelty and config.min_samples != 1:
        raise UserError(
            f"memory.novelty=true comes with memory.min_samples={config.min_samples}: it needs 1, since the reach of a "
            "cluster is read from the spanning tree of plain distances."
        )
