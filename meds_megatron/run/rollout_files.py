"""Rollout files of a run: parquet, a file a step, a row a response."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from meds_megatron import atomic
from meds_megatron.errors import UserError

ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("key", pa.string()),  # memory key: the problem's id and the correctness group
        ("group", pa.int32()),  # responses to the same prompt share it within a step
        ("source", pa.string()),  # of the problem: its data set, or kind of problem
        ("prompt", pa.string()),
        ("answer", pa.string()),  # the expected one
        ("response", pa.string()),
        ("response_token_ids", pa.list_(pa.int32())),
        ("given_tokens", pa.list_(pa.int32())),  # indices of those that the policy did not draw
        ("prompt_tokens", pa.int32()),
        ("response_tokens", pa.int32()),
        ("correct", pa.bool_()),
        ("outcome", pa.string()),  # of the grading: graded, no_answer, timeout, error
        ("score", pa.float32()),  # correctness plus over-long penalty
        ("penalty", pa.float32()),
        ("cluster_size", pa.int64()),  # earlier mistakes of the same cluster
        ("cluster_label", pa.int64()),  # of that cluster at the time: -1 noise, -2 no history
        ("shaped_score", pa.float32()),
        ("advantage", pa.float32()),
        ("fingerprint", pa.list_(pa.float32())),  # one value a layer
        ("policy_version", pa.int64()),  # of the weights that drew its first token
        ("later_versions", pa.list_(pa.list_(pa.int64()))),  # others, each with the first token that it drew
        ("kept", pa.bool_()),  # by the group filter
    ]
)


def write_rollouts(path: Path, step: int, columns: Mapping[str, Sequence]) -> None:
    """Writes a step's responses; the file appears whole or not at all. Raises UserError where it cannot be written.

    `columns` has every column of ROLLOUT_SCHEMA but `step`, all of one length; None where a response has no such value
    (for example no fingerprint, or no advantage because the group was not kept).
    """
    rows = len(columns["key"])
    table = pa.table({**columns, "step": [step] * rows}, schema=ROLLOUT_SCHEMA)
    try:
        with atomic.open_atomic(path, "wb") as file:
            pq.write_table(table, file, compression="zstd")
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written ({reason}): make space there and start the run again") from error


def read_columns(path: Path, names: list[str]) -> pa.Table:
    """Columns of a rollout file, a row for every response. Raises UserError for a damaged file and a missing column."""
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                raise UserError(f"{path}: there is no column `{missing[0]}`; `meds train` did not write this file.")
            return file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as parquet; remove the file and try again.") from error


def texts_of(column: pa.ChunkedArray) -> list[str]:
    """A column of strings; bytes that are not UTF-8 become U+FFFD."""
    return [(text or b"").decode("utf-8", "replace") for text in column.cast(pa.binary()).to_pylist()]


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers as float64, NaN where there is none."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def vectors_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists [B, L] float32, NaN in rows without one; L is 0 where no row has one."""
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    present_B = np.asarray(lists.is_valid())
    values = np.asarray(lists.flatten(), dtype=np.float32)
    rows = int(present_B.sum())
    vectors_BL = np.full((len(lists), len(values) // rows if rows else 0), np.nan, dtype=np.float32)
    vectors_BL[present_B] = values.reshape(rows, vectors_BL.shape[1])
    return vectors_BL
