"""Sizes of a Qwen model, read from its config.json without torch or transformers."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json

if TYPE_CHECKING:
    import numpy as np

Length = TypeVar("Length", float, "np.ndarray")

MOST = 2**26
"""Largest value of any size; those of published models are below a fifth of it."""
MOST_LAYERS = 2000
"""Largest number of layers; those of published models are below 130."""
ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense Qwen model."""

    architecture: str
    """`qwen2` or `qwen3`."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the embedding in the Hugging Face checkpoint."""
    tie_embeddings: bool
    rope_theta: float
    norm_eps: float
    max_positions: int

    @property
    def qk_norm(self) -> bool:
        """Whether an RMS norm is applied to each head's q and k."""
        return self.architecture == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections of q, k and v have a bias."""
        return self.architecture == "qwen2"

    def token_operations(self, length: Length) -> Length:
        """Floating-point operations of a forward pass for one token of sequences of `length` tokens.

        Matrix products cost 2 a weight, attention 4 * heads * head_dim * context a layer, halved by the causal mask
        (Megatron-LM, arXiv 2104.04473, section 5.1).
        """
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights = self.num_layers * self.hidden_size * (2 * query + 2 * key + 3 * self.ffn_size)
        weights += self.hidden_size * self.vocab_size
        return 2 * weights + self.num_layers * 4 * query * length / 2

    @classmethod
    def from_hf(cls, directory: str | Path) -> "ModelShape":
        """The shape in `directory`/config.json.

        Raises UserError when the directory or its config.json is missing, is not JSON, lacks a key, has a value of a
        wrong type or describes an unsupported model.
        """
        path = Path(directory).expanduser() / "config.json"
        if not path.parent.is_dir():
            raise UserError(f"model directory {path.parent} does not exist: give model.path a Hugging Face directory")
        if not path.is_file():
            raise UserError(f"{path} does not exist: a Hugging Face model directory has a config.json")
        try:
            raw = parse_json(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}): download the model again") from error
        if not isinstance(raw, dict):
            raise UserError(f"{path} contains a {type(raw).__name__}, expected a JSON object: download the model again")
        architecture = _architecture(raw, path)
        _check_supported(raw, path)
        try:
            hidden, heads = _size(raw, "hidden_size", path), _size(raw, "num_attention_heads", path)
            return cls(
                architecture=architecture,
                hidden_size=hidden,
                num_layers=_size(raw, "num_hidden_layers", path, most=MOST_LAYERS),
                num_heads=heads,
                num_kv_heads=_size(raw, "num_key_value_heads", path, heads),
                head_dim=_size(raw, "head_dim", path, hidden // heads),
                ffn_size=_size(raw, "intermediate_size", path),
                vocab_size=_size(raw, "vocab_size", path),
                tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
                rope_theta=_rope_theta(raw, path),
                norm_eps=_number(raw, "rms_norm_eps", path, 1e-6),
                max_positions=_size(raw, "max_position_embeddings", path, 32768),
            )
        except KeyError as error:
            raise UserError(f"{path} has no key {error}, which every Qwen2 and Qwen3 config.json has") from error


def _architecture(raw: dict, path: Path) -> str:
    names = raw.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: architectures is {names!r}, expected a list with one name: download the model again")
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    known = " and ".join(ARCHITECTURES)
    raise UserError(f"{path} describes {', '.join(names) or 'no architecture'}: only {known} can be trained")


def _check_supported(raw: dict, path: Path) -> None:
    if raw.get("use_sliding_window"):
        raise UserError(f"{path} turns on use_sliding_window, which is not supported: use a full-attention model")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = raw.get(key) or {}
        if not isinstance(scaling, dict):
            raise UserError(f"{path}: {key} is {scaling!r}, expected a JSON object: download the model again")
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise UserError(f"{path} has {key} {scaling}, which is not supported: remove it or use another model")
    if raw.get("attention_bias"):
        raise UserError(f"{path} turns on attention_bias, which no published Qwen3 has: use another model")


def _size(raw: dict, key: str, path: Path, default: int | None = None, most: int = MOST) -> int:
    """A whole number from 1 to `most`. Raises KeyError when it is missing without a default, UserError when it is
    another value.

    A null counts as missing where there is a default.
    """
    value = raw[key] if default is None else raw.get(key)
    value = default if value is None and default is not None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise UserError(
            f"{path}: {key} is {value!r}, expected a whole number above 0 and at most {most}: download the model again"
        )
    return value


def _number(raw: dict, key: str, path: Path, default: float | None = None) -> float:
    value = raw[key] if default is None else raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{path}: {key} is {value!r}, expected a number above 0: download the model again")
    return float(value)


def _rope_theta(raw: dict, path: Path) -> float:
    """`rope_theta` is a key of its own up to transformers 4, and one of `rope_parameters` from transformers 5 on."""
    return _number(raw if "rope_theta" in raw else raw.get("rope_parameters") or {}, "rope_theta", path)


def published_shape(path: str | Path) -> ModelShape | None:
    """The shape of the published model that a path names, the last of its parts first; None if it names none.

    `models/Qwen2.5-7B`, `Qwen/Qwen3-8B-Base` and a Hugging Face cache's `models--Qwen--Qwen3-8B/snapshots/...` do.
    """
    for part in reversed(Path(path).parts):
        name = part.rpartition("--")[2]
        shape = QWEN.get(re.sub(r"-(Instruct|Base)$", "", name))
        if shape is not None:
            # Qwen2.5's instruction-tuned models are published for fewer positions than their bases.
            limit = 32768 if name.endswith("-Instruct") else shape.max_positions
            return replace(shape, max_positions=min(shape.max_positions, limit))
    return None


def _qwen2(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    tied: bool,
    positions: int = 32768,
    theta: float = 1e6,
) -> ModelShape:
    return ModelShape("qwen2", hidden, layers, heads, kv_heads, head_dim, ffn, vocab, tied, theta, 1e-6, positions)


def _qwen3(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> ModelShape:
    return ModelShape("qwen3", hidden, layers, heads, kv_heads, 128, ffn, 151936, tied, 1e6, 1e-6, 40960)


VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM rounds the vocabulary up to a multiple of this before it shards it over an engine's ranks."""

LOGITS_BLOCK_TOKENS = 512
"""Response tokens whose logits the trainer has in memory at once."""

# The published models, for plans and benchmarks without a model directory. Source: their config.json on Hugging Face.
QWEN = {
    "Qwen2.5-0.5B": _qwen2(896, 24, 14, 2, 64, 4864, 151936, True),
    "Qwen2.5-1.5B": _qwen2(1536, 28, 12, 2, 128, 8960, 151936, True),
    "Qwen2.5-3B": _qwen2(2048, 36, 16, 2, 128, 11008, 151936, True),
    "Qwen2.5-7B": _qwen2(3584, 28, 28, 4, 128, 18944, 152064, False, 131072),
    "Qwen2.5-14B": _qwen2(5120, 48, 40, 8, 128, 13824, 152064, False, 131072),
    "Qwen2.5-32B": _qwen2(5120, 64, 40, 8, 128, 27648, 152064, False, 131072),
    "Qwen2.5-72B": _qwen2(8192, 80, 64, 8, 128, 29568, 152064, False, 131072),
    "Qwen2.5-Math-1.5B": _qwen2(1536, 28, 12, 2, 128, 8960, 151936, True, 4096, 1e4),
    "Qwen2.5-Math-7B": _qwen2(3584, 28, 28, 4, 128, 18944, 152064, False, 4096, 1e4),
    "Qwen2.5-Math-72B": _qwen2(8192, 80, 64, 8, 128, 29568, 152064, False, 4096, 1e4),
    "Qwen3-0.6B": _qwen3(1024, 28, 16, 8, 3072, True),
    "Qwen3-1.7B": _qwen3(2048, 28, 16, 8, 6144, True),
    "Qwen3-4B": _qwen3(2560, 36, 32, 8, 9728, True),
    "Qwen3-8B": _qwen3(4096, 36, 32, 8, 12288, False),
    "Qwen3-14B": _qwen3(5120, 40, 40, 8, 17408, False),
    "Qwen3-32B": _qwen3(5120, 64, 64, 8, 25600, False),
}

ARITHMETIC = ModelShape("qwen3", 128, 4, 4, 2, 32, 512, 320, True, 1e4, 1e-6, 512)
"""The model that `model.make: arithmetic` generates, for plans before it exists."""
