"""What the report reads of a run directory: settings, metrics and rollout files."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from meds_megatron.config import MemoryConfig
from meds_megatron.errors import UserError
from meds_megatron.run.metrics_file import read_metrics


@dataclass(frozen=True)
class RunFiles:
    """A run directory, finished or not."""

    path: Path
    settings: dict[str, Any]
    """By dotted key, as the run saved them: those of another version of this program may have other keys."""
    metrics: list[dict]
    """A dict a step, oldest first, with the names of `metrics.jsonl`."""
    rollouts: list[Path]
    """Parquet files of the steps, oldest first; none with `train.save_rollouts=false`."""

    @property
    def name(self) -> str:
        return str(self.settings.get("name", self.path.name))

    @property
    def memory(self) -> MemoryConfig:
        """Settings of the error memory; the defaults for those that the run did not have."""
        saved = {field.name: self.settings.get(f"memory.{field.name}", field.default) for field in fields(MemoryConfig)}
        return MemoryConfig(**saved)


def read_run(path: str | Path) -> RunFiles:
    """Raises UserError where there is no run, or a file of it is damaged."""
    path = Path(path).expanduser().absolute()
    if not (path / "metrics.jsonl").is_file() or not (path / "config.yaml").is_file():
        raise UserError(
            f"{path}: expected a run directory with config.yaml and metrics.jsonl; give one that `meds train` wrote."
        )
    return RunFiles(
        path,
        _read_settings(path / "config.yaml"),
        [line.values for line in read_metrics(path / "metrics.jsonl")],
        sorted((path / "rollouts").glob("step_*.parquet")),
    )


def _read_settings(path: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML; restore the file that the run wrote.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found none; restore the file that the run wrote.")
    return dict(_leaves(values))


def _leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
