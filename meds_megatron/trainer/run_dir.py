"""The directory of a run: its config, metrics, rollouts, checkpoints, exports and logs, and its one writer."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from meds_megatron.config import Config, save_config
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
        ("policy_version", pa.int64()),  # of the weights that generated it
        ("kept", pa.bool_()),  # by the group filter
    ]
)


class RunDirectory:
    """Paths of a run's files. `create` claims a directory for a new run; the constructor only names it."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Claim `config.run_dir` and save the config there; UserError where another run has been or is writing."""
        run = cls(config.run_dir)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            # Making this folder claims the directory: of two launches at once only one succeeds.
            run.rollouts.mkdir()
        except FileExistsError as error:
            raise UserError(
                f"{run.path}: there already is a run; give this one a name of its own (name=...), or remove it."
            ) from error
        except OSError as error:
            raise UserError(
                f"{run.path}: the run directory cannot be made ({error.strerror}); set run_dir=... to a writable place."
            ) from error
        save_config(config, run.config)
        return run

    def discard_if_empty(self, keep_logs: bool = False) -> None:
        """Removes the directory of a run that ended before its first line of metrics: its name is free again.

        With `keep_logs` the logs stay.
        """
        if self.metrics.exists() and self.metrics.stat().st_size:
            return
        logs = self.path / "logs"
        for path in self.path.iterdir():
            if path.is_dir() and not (keep_logs and path == logs):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_file():
                path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    def rollouts_of(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.parquet"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}"

    def hf_export(self, step: int) -> Path:
        return self.path / "hf" / f"step_{step:06d}"

    def last_logged_step(self) -> int:
        """Step of the last whole line of metrics, 0 if there is none."""
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1] if self.metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def save_rollouts(self, step: int, columns: Mapping[str, Sequence]) -> Path:
        """Write a step's responses, one row each; the file appears whole or not at all.

        `columns` has every column of ROLLOUT_SCHEMA but `step`, all of one length; None where a response has no such
        value (no fingerprint, say, or no advantage because the group was not kept).
        """
        rows = len(columns["key"])
        table = pa.table({**columns, "step": [step] * rows}, schema=ROLLOUT_SCHEMA)
        path = self.rollouts_of(step)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        return path
