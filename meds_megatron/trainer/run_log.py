"""Metrics of a run: a line a step in `metrics.jsonl`, in wandb and on the terminal."""

import errno
import json
import logging
import math
import netrc
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from urllib.parse import urlparse

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.trainer.console import Console
from meds_megatron.trainer.run_dir import RunDirectory

WANDB_TIMEOUT_SECONDS = 30
logger = logging.getLogger(__name__)


class RunLog:
    """Writes each step's metrics. A context manager."""

    def __init__(self, run: RunDirectory, config: Config, console: Console, wandb_id: str | None = None):
        """`wandb_id` continues the wandb run of that id."""
        self._console = console
        self._path = run.metrics
        self._file = open(run.metrics, "ab", buffering=0)
        self._wandb = _start_wandb(run, config, wandb_id) if config.wandb.enabled else None

    @property
    def wandb_id(self) -> str | None:
        """Of the wandb run, None without one."""
        return self._wandb.id if self._wandb else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a step's metrics, names as `group/name`; a value that is not finite is stored as null.

        Raises UserError, and leaves no part of a line, when the file cannot be written.
        """
        values = {name: _plain_number(value) for name, value in metrics.items()}
        if missing := [name for name, value in values.items() if value is None]:
            logger.warning("step %d: not finite: %s", step, ", ".join(missing))
        self._append(json.dumps({"step": step, **values}) + "\n")
        if self._wandb:
            self._wandb.log(values, step=step)
        self._console.step(step, metrics)

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
                f"{self._path} cannot be written ({error.strerror}): make space there and start the run again"
            ) from error

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)


def _plain_number(value: float) -> float | int | None:
    """NumPy's and torch's scalars as Python's; None for NaN and infinity, which JSON does not have."""
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _start_wandb(run: RunDirectory, config: Config, wandb_id: str | None):
    """The wandb run; offline without an API key or a connection."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
    if mode != "online":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb's own crash reports would use the network
    import wandb

    def start(mode: str, run_id: str):
        return wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.wandb.group,
            name=config.name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            dir=run.path,
            mode=mode,
            config=asdict(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_TIMEOUT_SECONDS),
        )

    try:
        return start(mode, wandb_id or secrets.token_hex(4))
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0]
        logger.warning("wandb cannot go online (%s); recording offline in %s", reason, run.path / "wandb")
        return start("offline", secrets.token_hex(4))  # wandb keeps the id of an attempt that failed


def _has_api_key() -> bool:
    """Whether wandb finds a key without a prompt: in its environment variable or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
