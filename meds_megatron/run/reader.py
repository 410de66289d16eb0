"""The directory of a run, finished or not, as everything but the run itself reads it."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from meds_megatron.config import Config, MemoryConfig, load_config
from meds_megatron.errors import UserError
from meds_megatron.run.metrics_file import read_metrics
from meds_megatron.run.paths import RunPaths


@dataclass(frozen=True)
class SavedRun:
    """Settings, metrics and files that a run has written so far."""

    path: Path
    settings: dict[str, Any]
    """Settings by dotted key, as the run saved them: those of another version of this program may have other keys."""
    metrics: list[dict]
    """A dict a step, oldest first, with the names of `metrics.jsonl`."""
    rollouts: list[Path]
    """Parquet files of the steps, oldest first; none with `train.save_rollouts=false`."""

    @property
    def name(self) -> str:
        return str(self.settings.get("name", self.path.name))

    @property
    def config(self) -> Config:
        """The settings. Raises UserError for those of another version of this program."""
        return load_config(RunPaths(self.path).config)

    @property
    def memory(self) -> MemoryConfig:
        """Settings of the error memory; the defaults for those that the run did not have."""
        saved = {field.name: self.settings.get(f"memory.{field.name}", field.default) for field in fields(MemoryConfig)}
        return MemoryConfig(**saved)


def read_run(path: str | Path) -> SavedRun:
    """Raises UserError where there is no run, or a file of it is damaged."""
    paths = RunPaths(path)
    if not paths.metrics.is_file() or not paths.config.is_file():
        raise UserError(
            f"{paths.path}: expected a run directory with config.yaml and metrics.jsonl; give one that `meds train` "
            "wrote."
        )
    return SavedRun(
        paths.path,
        _read_settings(paths.config),
        [line.values for line in read_metrics(paths.metrics)],
        sorted(paths.rollouts.glob("step_*.parquet")),
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
