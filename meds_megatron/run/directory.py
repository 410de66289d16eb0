"""The directory of a run: its config, metrics, rollouts, checkpoints, exports and logs, and its single writer."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLease

from meds_megatron import atomic
from meds_megatron.config import Config, load_config, save_config
from meds_megatron.config.changes import changes
from meds_megatron.config.functions import function_digests, named_functions
from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json
from meds_megatron.run.checkpoint_files import Checkpoint, any_completed, newest, remove_incomplete
from meds_megatron.run.lock import check_lock, lock_loss, run_lock
from meds_megatron.run.metrics_file import MetricsLine, read_metrics
from meds_megatron.run.paths import RunPaths
from meds_megatron.run.rollout_files import write_rollouts


class RunDirectory(RunPaths):
    """The directory of a run that trains: `claim` makes this process its single writer."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self._lock: SoftFileLease | None = None
        self._skip_memory = False

    @contextmanager
    def claim(self, config: Config) -> Iterator["RunDirectory"]:
        """Makes the directory, or resumes the run in it, for as long as the block lasts; saves the config there.

        Raises UserError where another process trains in it, where a run without checkpoints has been, where settings
        differ that make it another run (`config.changes`), and where it cannot be written. A run that ends before its
        first line of metrics leaves its name free, and logs only after an error that is not the user's.
        """
        self._skip_memory = config.memory.skip_damaged
        with ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.callback(self._remove_if_empty)
                self._lock = stack.enter_context(run_lock(self.path))
                self._check_resumable(config)
                self.check_lock()
                self.rollouts.mkdir(exist_ok=True)
                save_config(config, self.config)
                atomic.write_text(self.functions, json.dumps(function_digests(config), indent=1) + "\n")
            except OSError as error:
                raise UserError(
                    f"{self.path}: the run directory cannot be written ({error.strerror}); make space there, or set "
                    "run_dir=... to another place."
                ) from error
            keep_logs = True
            try:
                yield self
            except UserError:
                keep_logs = False
                raise
            finally:
                is_own = lock_loss(self._lock) is None
                if is_own and not self.started and not any_completed(self.checkpoints):
                    self._discard(keep_logs)

    def check_lock(self) -> None:
        """Raises UserError when the claim has passed to another process. Called before each change of a file that the
        other one has, or reads."""
        if self._lock is not None:
            check_lock(self._lock)

    def newest_checkpoint(self, passed_over: Mapping[Path, str] | None = None) -> Checkpoint | None:
        """The checkpoint to resume from, none of those `passed_over`; None where a run starts. Raises UserError when
        every one is damaged."""
        return newest(self.checkpoints, passed_over, self._skip_memory)

    def rewind(self, step: int | None) -> None:
        """Removes what was written after step `step` (None: all of it), a torn end of the metrics, and incomplete
        checkpoints and exports. Raises UserError for a line of metrics before that which cannot be read."""
        self.check_lock()
        last = -1 if step is None else step
        try:
            remove_incomplete(self.checkpoints)
            for path in self.path.glob(".*.partial"):
                path.unlink(missing_ok=True)
            for path in [*self.rollouts.glob("*"), *self.exports.glob(".*"), *self.exports.glob("step_*")]:
                number = path.name.removeprefix("step_").removesuffix(".parquet")
                if not number.isdigit() or int(number) > last:
                    _remove(path)
            if self.metrics.exists():
                self._keep_metrics(last)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.path} cannot be removed or written ({error.strerror}), which a run that "
                "continues from an earlier step needs: make space or access there"
            ) from error

    def _keep_metrics(self, last: int) -> None:
        """Drops the lines of metrics after step `last`."""
        kept = [line.text for line in self._metrics_lines() if line.step <= last]
        atomic.write_text(self.metrics, "".join(line + "\n" for line in kept))

    @property
    def started(self) -> bool:
        """Whether a line of metrics was written."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    def last_logged_step(self) -> int:
        """Step of the last whole line of metrics, 0 if there is none."""
        lines = self._metrics_lines()
        return lines[-1].step if lines else 0

    def _metrics_lines(self) -> list[MetricsLine]:
        return read_metrics(self.metrics) if self.metrics.exists() else []

    def _check_resumable(self, config: Config) -> None:
        if not self.config.exists() or not (self.started or any_completed(self.checkpoints)):
            return
        checkpoint = self.newest_checkpoint()
        saved = checkpoint.config if checkpoint else load_config(self.config)
        # A run that died before its first checkpoint, which is complete when the second begins, starts again. One that
        # continued beyond that, or that finished, has lost its checkpoints and is not overwritten.
        last = self.last_logged_step()
        had_none_yet = last <= 2 * saved.checkpoint.every and last < saved.train.steps
        if checkpoint is None and not (had_none_yet and config.checkpoint.every):
            raise UserError(
                f"{self.path}: there already is a run, without checkpoints; give this one a name of its own "
                "(name=...), or remove it."
            )
        free, other = changes(saved, config)
        other += self._changed_functions(config)
        if other and not config.checkpoint.accept_changes:
            raise UserError(
                f"{self.path}: there is a run with other settings ({'; '.join(other)}): give this one a name of its "
                "own (name=...), set them back, or set checkpoint.accept_changes=true to resume with the new ones."
            )
        for change in free + other:
            print(f"meds: resuming with {change}", file=sys.stderr)

    def check_functions(self, config: Config) -> None:
        """Raises UserError when the file of a function that the config names has changed since the run was claimed:
        processes that are started now would have another version than those before."""
        if changed := self._changed_functions(config):
            raise UserError(f"{'; '.join(changed)} while the run was under way: put it back and start the run again")

    def _changed_functions(self, config: Config) -> list[str]:
        """Functions of the user's own whose files are no longer what they were when the run was last started."""
        try:
            saved = parse_json(self.functions.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return []
        return [
            f"{key}: the file of {named_functions(config)[key]} has changed"
            for key, digest in function_digests(config).items()
            if isinstance(saved, dict) and saved.get(key, digest) != digest
        ]

    def _discard(self, keep_logs: bool) -> None:
        for name in ("rollouts", "checkpoints", "hf", "wandb", *([] if keep_logs else ["logs"])):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for path in (self.config, self.functions, self.metrics):
            path.unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.path.rmdir()

    def save_rollouts(self, step: int, columns: Mapping[str, Sequence]) -> Path:
        """Writes a step's responses as `rollout_files.write_rollouts` does."""
        self.check_lock()
        path = self.rollouts_of(step)
        write_rollouts(path, step, columns)
        return path


def _remove(path: Path) -> None:
    """Removes a file or a directory; of a symbolic link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
