"""Whether two models, each a Hugging Face directory or a checkpoint, are the same."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.conversion.checkpoint import CheckpointWeights, is_checkpoint
from meds_megatron.weights.conversion.convert import to_hf
from meds_megatron.weights.conversion.text_logprobs import SAMPLE_TEXT, text_tokens, token_logprobs
from meds_megatron.weights.load import HfWeights
from meds_megatron.weights.table import Entry, build_table

LOGPROB_LIMIT = 1e-4
MOST_SHOWN = 20
_SLAB_ELEMENTS = 2**20
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify(
    a: str | Path,
    b: str | Path,
    tolerance: float | None = None,
    text: str | None = SAMPLE_TEXT,
    logprob_limit: float = LOGPROB_LIMIT,
) -> dict:
    """Compares all weights tensor by tensor, then the log-probabilities of `text` (None: only the weights).

    Weights must be the same bit for bit, or with a `tolerance` may differ by so much in value, whatever their dtype.
    Memory holds one parameter of each model, then one model at a time in float32; a checkpoint is converted to a
    temporary directory for its log-probabilities.

    Returns a JSON-able dict: `equal`, `first_difference` (a tensor's name or None), `weights`, `logprobs` and the first
    MOST_SHOWN `differing_tensors`. A difference is None where there is no number for it: another shape, not a number.
    Raises UserError when a model cannot be read.
    """
    sides = [_open(a), _open(b)]
    tokens = [] if text is None else [text_tokens(directory, text) for directory in (a, b)]
    rows = list(_rows(*sides))
    differing = [row for row in rows if _differs(row, tolerance)]
    numbers = [row["max_abs_difference"] for row in rows]
    result = {
        "a": str(a),
        "b": str(b),
        "weights": {
            "tensors": len(rows),
            "differing": len(differing),
            "max_abs_difference": None if None in numbers else max(numbers),
            "dtypes_a": _dtypes(rows, "a"),
            "dtypes_b": _dtypes(rows, "b"),
        },
    }
    equal = not differing
    if text is not None:
        result["logprobs"] = _compare_logprobs((a, b), tokens, logprob_limit)
        equal = equal and result["logprobs"]["equal"]
    shown = [{key: value for key, value in row.items() if key != "identical"} for row in differing[:MOST_SHOWN]]
    return result | {
        "first_difference": differing[0]["tensor"] if differing else None,
        "differing_tensors": shown,
        "equal": equal,
    }


class _HfDirectory:
    """A Hugging Face directory, read parameter by parameter as a checkpoint is."""

    def __init__(self, directory: str | Path):
        self._weights = HfWeights(directory)
        self._table = build_table(ModelShape.from_hf(directory))
        self._weights.check(self._table.hf_shapes)

    def entries(self) -> Iterator[Entry]:
        return (entry for entry in self._table.entries.values() if not entry.copy)

    def read(self, entry: Entry) -> dict[str, Tensor]:
        return {name: self._weights.tensor(name) for name in entry.hf_shapes()}


def _open(directory: str | Path) -> CheckpointWeights | _HfDirectory:
    return CheckpointWeights(directory) if is_checkpoint(directory) else _HfDirectory(directory)


def _rows(a: CheckpointWeights | _HfDirectory, b: CheckpointWeights | _HfDirectory) -> Iterator[dict]:
    """A row for every tensor of either model: its name, what it is on both sides, and how far they are apart."""
    of_b = {entry.name: entry for entry in b.entries()}
    for entry in a.entries():
        tensors_a = a.read(entry)
        tensors_b = b.read(of_b.pop(entry.name)) if entry.name in of_b else {}
        for name in tensors_a | tensors_b:
            yield _row(name, tensors_a.get(name), tensors_b.get(name))
    for entry in of_b.values():
        for name, tensor in b.read(entry).items():
            yield _row(name, None, tensor)


def _row(name: str, a: Tensor | None, b: Tensor | None) -> dict:
    comparable = a is not None and b is not None and a.shape == b.shape
    identical = comparable and a.dtype == b.dtype and _bits(a).equal(_bits(b))
    difference = 0.0 if identical else _max_abs_difference(a, b) if comparable else None
    return {
        "tensor": name,
        "a": _kind(a),
        "b": _kind(b),
        "max_abs_difference": difference,
        "identical": identical,
    }


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: equal only where every bit is, in zeros with a sign and in NaN too."""
    return tensor.view(_BITS[tensor.dtype.itemsize])


def _max_abs_difference(a: Tensor, b: Tensor) -> float | None:
    most = 0.0
    pairs = (tensor.reshape(-1).split(_SLAB_ELEMENTS) for tensor in (a, b))
    for slab_a, slab_b in zip(*pairs, strict=True):
        difference = (slab_a.double() - slab_b.double()).abs().max().item()
        if not math.isfinite(difference):
            return None
        most = max(most, difference)
    return most


def _differs(row: dict, tolerance: float | None) -> bool:
    if tolerance is None:
        return not row["identical"]
    return row["max_abs_difference"] is None or row["max_abs_difference"] > tolerance


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(rows: list[dict], side: str) -> str:
    return " and ".join(sorted({row[side].split()[0] for row in rows} - {"missing"}))


def _compare_logprobs(sides: tuple[str | Path, str | Path], tokens: list[list[int]], limit: float) -> dict:
    same_tokens = tokens[0] == tokens[1]
    found = {"tokens": len(tokens[0]), "same_tokens": same_tokens, "abs_max": None, "abs_mean": None, "limit": limit}
    if not same_tokens:
        return found | {"equal": False}
    logprobs = []
    for side, ids in zip(sides, tokens, strict=True):
        with _as_hf(side) as directory:
            logprobs.append(token_logprobs(directory, ids))
    difference_T = (logprobs[0] - logprobs[1]).abs()
    most, mean = difference_T.max().item(), difference_T.mean().item()
    if not math.isfinite(most):
        return found | {"equal": False}
    return found | {"abs_max": most, "abs_mean": mean, "equal": most <= limit}


@contextmanager
def _as_hf(directory: str | Path) -> Iterator[Path]:
    if not is_checkpoint(directory):
        yield Path(directory)
        return
    with tempfile.TemporaryDirectory(prefix="meds-verify-") as temporary:
        converted = Path(temporary) / "hf"
        to_hf(directory, converted, torch.float32)
        yield converted
