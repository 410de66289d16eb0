"""Comparison of two models, each a Hugging Face directory or a checkpoint: their weights, then the log-probabilities
that plain transformers gives to a text with each."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.conversion.checkpoint import CheckpointWeights, is_checkpoint
from meds_megatron.weights.conversion.convert import to_hf
from meds_megatron.weights.hf_weights import HfWeights
from meds_megatron.weights.table import Table, build_table

LOGPROB_LIMIT = 1e-4
MOST_SHOWN = 20
WINDOW = 256
"""Tokens of one forward pass. The text is split into windows, each computed without those before it."""

SAMPLE_TEXT = r"""A train leaves the station at 9:40 and travels 84 kilometres in an hour and ten minutes. What is its
average speed? Please reason step by step, and put your final answer within \boxed{}.

An hour and ten minutes are 70 minutes, or 7/6 of an hour. The speed is 84 / (7/6) = 84 * 6 / 7 = 72 kilometres per
hour, so the answer is \boxed{72}.

def primes(limit: int) -> list[int]:
    found = []
    for number in range(2, limit + 1):
        if all(number % prime for prime in found):
            found.append(number)
    return found

Let $f(x) = x^3 - 3x + 1$. Then $f'(x) = 3x^2 - 3$ vanishes at $x = \pm 1$, where $f(-1) = 3$ and $f(1) = -1$; since
the signs differ, $f$ has three real roots. La somme de ces racines est nulle. 三个根的乘积等于负一。
Das folgt aus dem Satz von Vieta: the sum of the roots is minus the coefficient of $x^2$, and their product is minus the
constant term.
"""

_CHUNK_ELEMENTS = 2**20
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
    MOST_SHOWN `differing_tensors`. A difference is None where it has no value: for another shape, or a NaN.
    Raises UserError when a model cannot be read.
    """
    sides = _open(a), _open(b)
    tokens = [] if text is None else [text_tokens(directory, text) for directory in (a, b)]
    rows = list(_rows(*sides))
    differing = [row for row in rows if _differs(row, tolerance)]
    numbers = [row["max_abs_difference"] for row in rows]
    weights = {
        "tensors": len(rows),
        "differing": len(differing),
        "max_abs_difference": None if None in numbers else max(numbers),
        "dtypes_a": _dtypes(rows, "a"),
        "dtypes_b": _dtypes(rows, "b"),
    }
    result: dict[str, Any] = {"a": str(a), "b": str(b), "weights": weights}
    if text is not None:
        result["logprobs"] = _compare_logprobs((a, b), tokens, logprob_limit)
    return result | {
        "first_difference": differing[0]["tensor"] if differing else None,
        "differing_tensors": [{key: row[key] for key in row if key != "identical"} for row in differing[:MOST_SHOWN]],
        "equal": not differing and (text is None or result["logprobs"]["equal"]),
    }


def _open(directory: str | Path) -> tuple[Table, CheckpointWeights | HfWeights]:
    """The model's table, and its weights to be read parameter by parameter."""
    if is_checkpoint(directory):
        checkpoint = CheckpointWeights(directory)
        return checkpoint.table, checkpoint
    weights = HfWeights(directory)
    table = build_table(ModelShape.from_hf(directory))
    weights.check(table.hf_shapes)
    return table, weights


def _rows(*sides: tuple[Table, CheckpointWeights | HfWeights]) -> Iterator[dict]:
    """A row for every tensor of either model: its name, type and shape on both sides, and their difference."""
    (table_a, weights_a), (table_b, weights_b) = sides
    stored_a, stored_b = ({parameter.name: parameter for parameter in t.stored} for t in (table_a, table_b))
    for name in stored_a | stored_b:
        tensors_a = weights_a.read(stored_a[name]) if name in stored_a else {}
        tensors_b = weights_b.read(stored_b[name]) if name in stored_b else {}
        for hf_name in list(tensors_a | tensors_b):
            yield _row(hf_name, tensors_a.pop(hf_name, None), tensors_b.pop(hf_name, None))


def _row(name: str, a: Tensor | None, b: Tensor | None) -> dict:
    row = {"tensor": name, "a": _kind(a), "b": _kind(b), "max_abs_difference": None, "identical": False}
    if a is None or b is None or a.shape != b.shape:
        return row
    # As integers: equal only where every bit is, in zeros with a sign and in NaN too.
    if a.dtype == b.dtype and a.view(_BITS[a.itemsize]).equal(b.view(_BITS[b.itemsize])):
        return row | {"max_abs_difference": 0.0, "identical": True}
    pairs = zip(a.reshape(-1).split(_CHUNK_ELEMENTS), b.reshape(-1).split(_CHUNK_ELEMENTS), strict=True)
    return row | {"max_abs_difference": _number(torch.stack([(x.double() - y.double()).abs().max() for x, y in pairs]))}


def _differs(row: dict, tolerance: float | None) -> bool:
    if tolerance is None:
        return not row["identical"]
    return row["max_abs_difference"] is None or row["max_abs_difference"] > tolerance


def _number(differences: Tensor) -> float | None:
    """The largest of the differences; None where one of them is no number."""
    largest = differences.max().item()
    return largest if math.isfinite(largest) else None


def _kind(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _dtypes(rows: list[dict], side: str) -> str:
    return " and ".join(sorted({row[side].split()[0] for row in rows} - {"missing"}))


def _compare_logprobs(sides: tuple[str | Path, str | Path], tokens: list[list[int]], limit: float) -> dict:
    same_tokens, most, mean = tokens[0] == tokens[1], None, None
    if same_tokens:
        logprobs_a_T, logprobs_b_T = (_model_logprobs(side, tokens[0]) for side in sides)
        difference_T = (logprobs_a_T - logprobs_b_T).abs()
        most, mean = _number(difference_T), _number(difference_T.mean())
    return {
        "tokens": len(tokens[0]),
        "same_tokens": same_tokens,
        "abs_max": most,
        "abs_mean": mean,
        "limit": limit,
        "equal": most is not None and most <= limit,
    }


def text_tokens(directory: str | Path, text: str) -> list[int]:
    """The text in the tokens of the directory's tokenizer; nothing else in the directory is read.

    Raises UserError when there is no readable tokenizer, or not enough text.
    """
    from transformers import AutoTokenizer

    if not text.strip():
        raise UserError("the text to compare log-probs on is empty: give a longer one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not tokens:
            # transformers makes an empty tokenizer of a directory without one.
            raise ValueError("the text has no tokens")
    except Exception as error:
        # The exception of a broken tokenizer depends on its kind, and may have many lines.
        raise UserError(
            f"{directory} has no tokenizer that transformers can read: add the model's tokenizer files, or compare with"
            " --weights-only"
        ) from error
    if len(tokens) == 1:
        raise UserError(f"the text to compare log-probs on is a single token to {directory}: give a longer one")
    return tokens


@torch.no_grad()
def token_logprobs(directory: str | Path, tokens: list[int]) -> Tensor:
    """Natural log-probabilities [T'] of all tokens but the first of each window, computed in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    parts = []
    for begin in range(0, len(tokens), WINDOW):
        window_T = torch.tensor(tokens[begin : begin + WINDOW])
        logprobs_TV = model(window_T[None]).logits[0, :-1].log_softmax(-1)
        parts.append(logprobs_TV.gather(1, window_T[1:, None])[:, 0])
    return torch.cat(parts)


def _model_logprobs(directory: str | Path, tokens: list[int]) -> Tensor:
    if not is_checkpoint(directory):
        return token_logprobs(directory, tokens)
    with tempfile.TemporaryDirectory(prefix="meds-verify-") as temporary:
        to_hf(directory, Path(temporary) / "hf", torch.float32)
        return token_logprobs(Path(temporary) / "hf", tokens)
