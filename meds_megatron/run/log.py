"""Metrics of a run: a line a step in `metrics.jsonl`, in wandb and on the terminal."""

import errno
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.run.console import Console
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.wandb_run import WandbRun

logger = logging.getLogger(__name__)


class RunLog:
    """Writes each step's metrics. A context manager."""

    def __init__(self, run: RunDirectory, config: Config, console: Console, wandb_id: str | None = None):
        """`wandb_id` continues the wandb run of that id."""
        self._console, self._run = console, run
        self._file = open(run.metrics, "ab", buffering=0)  # noqa: SIM115
        self._wandb = WandbRun(run, config, wandb_id) if config.wandb.enabled else None
        self._responses_every = config.wandb.responses_every

    @property
    def wandb_id(self) -> str | None:
        """Id of the wandb run; None without one."""
        return self._wandb.id if self._wandb else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a step's metrics, names as `group/name`; a value that is not finite is stored as null.

        Raises UserError, and leaves no part of a line, when the file cannot be written or is another process's by now.
        """
        self._run.check_lock()
        values = {name: _plain_number(value) for name, value in metrics.items()}
        if missing := [name for name, value in values.items() if value is None]:
            logger.warning("step %d: not finite: %s", step, ", ".join(missing))
        self._append(json.dumps({"step": step, **values}) + "\n")
        if self._wandb:
            self._wandb.log(step, values)
        self._console.step(step, metrics)

    def log_responses(self, step: int, columns: Mapping[str, Sequence]) -> None:
        """Records samples of a step's responses, columns as of its rollout file, every `wandb.responses_every` steps
        and after the first."""
        if self._wandb and self._responses_every and (step == 1 or step % self._responses_every == 0):
            self._wandb.log_responses(step, columns)

    def _append(self, line: str) -> None:
        data, end = line.encode(), os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise UserError(
                f"{self._run.metrics} cannot be written ({error.strerror}): make space there and start the run again"
            ) from error

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish(failed)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)


def _plain_number(value: float) -> float | int | None:
    """NumPy's and torch's scalars as Python's; None for NaN and infinity, which JSON does not have."""
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None
