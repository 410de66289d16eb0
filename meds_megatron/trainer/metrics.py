"""What a run reports: numbers a step, in `metrics.jsonl` and in wandb, and the time each phase of a step takes."""

import json
import math
import netrc
import os
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from urllib.parse import urlparse

from meds_megatron.config import Config
from meds_megatron.trainer.run_dir import RunDirectory

WANDB_TIMEOUT_SECONDS = 30


class PhaseTimer:
    """Seconds spent in each phase of a step.

    with timer("rollout"): ...      # adds to time/rollout, however often it is entered
    timer.take()                    # {"time/rollout": 2.1, ..., "time/step": 4.0}, and starts the next step
    """

    def __init__(self, on_phase: Callable[[str], None] | None = None):
        """`on_phase` hears the name of every phase as it begins."""
        self._on_phase = on_phase
        self._start_step()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._on_phase:
            self._on_phase(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase, and of the whole step, since the last call; what follows counts for the next step."""
        metrics = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        metrics["time/step"] = time.perf_counter() - self._step_started
        self._start_step()
        return metrics

    def _start_step(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._step_started = time.perf_counter()


class MetricsLog:
    """The metrics of a run, a line a step in `metrics.jsonl` and, where enabled, in wandb. A context manager."""

    def __init__(self, run: RunDirectory, config: Config):
        self._file = open(run.metrics, "a", encoding="utf-8")
        self._wandb = _start_wandb(run, config) if config.wandb.enabled else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record a step's metrics, names as `group/name`; a value that is not finite is stored as null."""
        values = {name: _plain_number(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log(values, step=step)

    def close(self, failed: bool = False) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)


def _plain_number(value: float) -> float | int | None:
    """JSON knows neither NumPy's and torch's scalars nor NaN."""
    value = value.item() if hasattr(value, "item") else value
    return value if math.isfinite(value) else None


def _start_wandb(run: RunDirectory, config: Config):
    """The wandb run, under an id that is kept in the run directory; offline without an API key or a connection."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")
    if mode != "online":
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # wandb's own crash reports would use the network
    import wandb

    def start(mode: str, run_id: str):
        run.wandb_id.write_text(run_id)
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
        return start(mode, run.wandb_id.read_text() if run.wandb_id.exists() else _new_id())
    except wandb.Error as error:
        reason = str(error).strip().splitlines()[0]
        print(f"meds: wandb cannot go online ({reason}); recording offline in {run.path / 'wandb'}", file=sys.stderr)
        return start("offline", _new_id())  # wandb holds on to the id of an attempt that failed


def _new_id() -> str:
    return secrets.token_hex(4)


def _has_api_key() -> bool:
    """Whether wandb would find a key without asking: in its environment variable or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
