"""Checkpoints of a run, saved between its steps: everything that it is."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from meds_megatron import atomic
from meds_megatron.config import Config, save_config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.errors import UserError
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.run.checkpoint_files import (
    MEMORY,
    Checkpoint,
    mark_complete,
    prune,
    publish,
    remove,
    write_state,
)
from meds_megatron.run.directory import RunDirectory
from meds_megatron.trainer.processes import Processes
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.weight_sync import WeightSync
from meds_megatron.weights.model_files import copy_model_files

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves policy, memory, random states and TrainerState together, one checkpoint at a time.

    A save returns when everything is copied; trainer ranks and memory shards write while the next steps run, and the
    next call after they are done completes the checkpoint. A checkpoint that cannot be written ends the run with a
    UserError and leaves those before it.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        model_dir: str | Path,
        processes: Processes,
        state: TrainerState,
        weight_sync: WeightSync,
        resumed_from: Checkpoint | None = None,
    ) -> None:
        self._config, self._run, self._model_dir = config, run, Path(model_dir)
        self._policy, self._pool, self._memory = processes.policy, processes.pool, processes.memory
        self._timer, self._current_state, self._weight_sync = processes.timer, state, weight_sync
        self._take_state()
        self._newest = resumed_from.step if resumed_from else None
        """Step of the newest checkpoint, complete or under way."""
        self._under_way: Path | None = None
        """The directory in which it is written."""

    def export_if_due(self, step: int) -> None:
        """Writes the policy as a Hugging Face directory every `train.export_every` steps and after the last one."""
        train = self._config.train
        is_due = (train.export_every and step % train.export_every == 0) or step == train.steps
        if train.export_hf and is_due:
            with self._timer("export"):
                self._run.check_lock()
                self._policy.export(str(self._run.hf_export(step)))

    def step_finished(self) -> None:
        """Saves the run after a finished step if it is time, and completes a checkpoint that has been written."""
        with self._timer("checkpoint"):
            self._run.check_lock()
            self._take_state()
            if self._under_way and self._policy.save_written():
                self.complete()
            settings, step = self._config.checkpoint, self._state["step"]
            if settings.every and (step % settings.every == 0 or step == self._config.train.steps):
                self._begin()
                if not settings.asynchronous:
                    self.complete()

    def save_last(self) -> Path | None:
        """Saves the run as of its last finished step; None with `checkpoint.every: 0`.

        Allowed as long as no later step has changed the policy or the memory.
        """
        if not self._config.checkpoint.every:
            return None
        if self._newest != self._state["step"]:
            self._begin()
        self.complete()
        return self._run.checkpoint(self._state["step"])

    def complete(self) -> None:
        """Waits until the checkpoint under way is complete; returns at once when there is none."""
        if self._under_way is None or self._newest is None:
            return
        partial, self._under_way = self._under_way, None
        path = self._run.checkpoint(self._newest)
        with self._removed_on_failure(path, partial):
            digests = self._policy.finish_save()
            digests |= {f"{MEMORY}/{name}": digest for name, digest in self._memory.finish_save().items()}
            mark_complete(partial, digests)
            self._run.check_lock()
            publish(partial, path)
        settings = self._config.checkpoint
        self._run.check_lock()
        prune(path.parent, settings.keep_last, settings.keep_every)
        logger.info("checkpoint %s is complete", path)

    def _take_state(self) -> None:
        self._state, self._policy_version = self._current_state.state_dict(), self._weight_sync.version
        """State and policy version as of the last finished step."""

    def _begin(self) -> None:
        self.complete()
        self._run.check_lock()
        step = self._state["step"]
        path = self._run.checkpoint(step)
        partial = atomic.partial_name(path)
        with self._removed_on_failure(path, partial):
            partial.mkdir(parents=True)
            self._policy.begin_save(str(partial))
            self._memory.begin_save(str(partial / MEMORY))
            random_states: dict[str, Any] = self._pool.random_states()
            np.savez(partial / "rng" / "engines.npz", **random_states)
            copy_model_files(self._model_dir, partial)
            save_config(self._config, partial / "config.yaml")
            write_state(partial, self._state, self._policy_version, asdict(ParallelLayout.from_config(self._config)))
        self._newest, self._under_way = step, partial

    @contextmanager
    def _removed_on_failure(self, path: Path, partial: Path) -> Iterator[None]:
        """Removes what the block has written of a checkpoint when it fails; an OSError becomes a UserError."""
        try:
            yield
        except BaseException as error:
            remove(partial)
            if isinstance(error, (OSError, UserError)):
                # A process that has taken the lock removes what others were writing, which then fails.
                self._run.check_lock()
            if isinstance(error, OSError):
                raise UserError(f"{path} cannot be written ({error.strerror}): make space or access there") from error
            raise


def restore_engines(checkpoint: Checkpoint, pool: EnginePool) -> bool:
    """Continues the engines' random states; False, and new ones, where other engines saved them."""
    path = checkpoint.engine_random_states
    try:
        with np.load(path, allow_pickle=False) as states:
            saved = dict(states)
    except (OSError, ValueError, BadZipFile, zlib.error) as error:
        # Only of a release that kept no digests.
        raise UserError(
            f"{path} cannot be read ({error}): it is damaged; remove the checkpoint to resume from the one before it"
        ) from error
    return pool.set_random_states(saved, checkpoint.step)
