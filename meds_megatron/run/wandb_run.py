"""The wandb run of a training run."""

import logging
import netrc
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np

from meds_megatron.config import Config
from meds_megatron.run.code_version import code_version
from meds_megatron.run.directory import RunDirectory

if TYPE_CHECKING:
    import wandb

TIMEOUT_SECONDS = 30
RESPONSE_COLUMNS = [
    "source",
    "prompt",
    "answer",
    "response",
    "outcome",
    "correct",
    "score",
    "penalty",
    "cluster_label",
    "cluster_size",
    "shaped_score",
    "advantage",
]
"""Columns of a rollout file that the table of sample responses has."""
logger = logging.getLogger(__name__)


class WandbRun:
    """Metrics over `step`, a section for each group of `group/name`, and tables of sample responses.

    A resumed run is the same wandb run. What it computes a second time is recorded a second time at the same `step`:
    wandb's own counter, which only grows, is no axis.
    """

    def __init__(self, run: RunDirectory, config: Config, run_id: str | None):
        """`run_id` continues the wandb run of that id. Offline without an API key or a connection."""
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
        if mode != "online":
            os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb's own crash reports would use the network
        import wandb

        self.id = run_id or secrets.token_hex(4)
        self._responses = config.wandb.responses
        try:
            self._run = self._start(run, config, mode)
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("wandb cannot go online (%s); recording offline in %s", reason, run.path / "wandb")
            wandb.teardown()  # else the id counts as in use
            self._run = self._start(run, config, "offline")
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        # Two for each shard; the slowest shard's are among the others.
        for name in ("memory/lookup_seconds_shard_*", "memory/recluster_seconds_shard_*"):
            self._run.define_metric(name, step_metric="step", hidden=True)

    def _start(self, run: RunDirectory, config: Config, mode: Any) -> "wandb.Run":
        import wandb

        return wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=config.wandb.group,
            name=config.name,
            id=self.id,
            resume="allow" if mode == "online" else None,
            dir=run.path,
            mode=mode,
            config=asdict(config) | {"code": code_version()},
            allow_val_change=True,  # a resumed run may have other settings and newer code
            settings=wandb.Settings(silent=True, console="off", init_timeout=TIMEOUT_SECONDS),
        )

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        self._run.log({"step": step, **values})

    def log_responses(self, step: int, columns: Mapping[str, Sequence]) -> None:
        """A table of `wandb.responses` responses, spread evenly over the step's."""
        import wandb

        rows = np.linspace(0, len(columns["key"]) - 1, self._responses).round().astype(int)
        table = wandb.Table(columns=["step", *RESPONSE_COLUMNS], allow_mixed_types=True)
        for row in dict.fromkeys(rows.tolist()):
            table.add_data(step, *(_plain(columns[name][row]) for name in RESPONSE_COLUMNS))
        self._run.log({"step": step, "samples/responses": table})

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _plain(value: object) -> object:
    """NumPy's scalars as Python's."""
    return value.item() if isinstance(value, np.generic) else value


def _has_api_key() -> bool:
    """Whether wandb finds a key without a prompt: in its environment variable or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
