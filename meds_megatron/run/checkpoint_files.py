"""Checkpoint directories as files: complete or not, found, pruned and removed. Pure file operations.

A checkpoint is written under a hidden name that no other save has, and gets its own when it is complete.

checkpoints/step_000010/
    complete.json            name, size and digest of every other file; written last
    state.json               the TrainerState and the layout
    config.yaml              settings of the run
    *.distcp, .metadata, metadata.json, common.pt
                             model and optimizer, megatron-core's distributed format
    config.json, tokenizer.json, ...
                             of the model, for `meds convert to-hf`
    memory/                  the error memory, a file a shard
    rng/                     random states, a file a rank and one of all engines
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meds_megatron import atomic, digests
from meds_megatron.config import Config, load_config
from meds_megatron.digests import MARKER, Manifest, file_digest
from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json

STATE_FILE = "state.json"
POLICY_VERSION = "policy_version"
MEMORY = "memory"
FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    layout: dict[str, int]
    """Sizes of the parallel layout that saved it."""
    state: dict[str, Any]
    """`TrainerState.state_dict()`, and the policy's version."""

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Raises UserError when the checkpoint's state is of another format."""
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path / STATE_FILE} has format {content.get('format')}, expected {FORMAT}: resume with the release "
                "that saved it"
            )
        return cls(path, content["state"]["step"], content["layout"], content["state"])

    @property
    def policy_version(self) -> int:
        """Version of the policy. Raises UserError for a state without one."""
        version = self.state.get(POLICY_VERSION)
        if not isinstance(version, int) or isinstance(version, bool):
            raise UserError(
                f"{self.path / STATE_FILE}: {POLICY_VERSION} is {version}, expected a number: put the file back, or "
                "remove the checkpoint"
            )
        return version

    @property
    def config(self) -> Config:
        return load_config(self.path / "config.yaml")

    @property
    def memory(self) -> Path:
        return self.path / MEMORY

    @property
    def engine_random_states(self) -> Path:
        return self.path / "rng" / "engines.npz"


def write_state(path: Path, state: dict[str, Any], policy_version: int, layout: dict[str, int]) -> None:
    """Writes what `Checkpoint.read` reads."""
    state = {**state, POLICY_VERSION: policy_version}
    atomic.write_text(path / STATE_FILE, json.dumps({"format": FORMAT, "layout": layout, "state": state}, indent=1))


def newest(
    directory: Path, passed_over: Mapping[Path, str] | None = None, skip_memory: bool = False
) -> Checkpoint | None:
    """The newest complete checkpoint in `directory`, None where none was ever completed.

    One that was complete and has been damaged since is named and passed over; UserError if all of them are. Those in
    `passed_over`, each with its damage, have been named before. The content of large files is not looked at: the ranks
    that read them do; nor, with `skip_memory`, is that of the error memory.
    """
    damages = []
    for path in reversed(completed(directory)):
        if passed_over and path in passed_over:
            damages.append(passed_over[path])
            continue
        if damage := damage_of(path, skip_memory=skip_memory):
            logger.warning("%s: the checkpoint is passed over", damage)
            damages.append(damage)
            continue
        return Checkpoint.read(path)
    if damages:
        raise UserError(
            f"{directory}: no checkpoint is whole, and the newest is damaged ({damages[0]}): put its files back, "
            "give the run a name of its own (name=...) to start from scratch, or remove the directory"
        )
    return None


def any_completed(directory: Path) -> bool:
    """Whether there is a checkpoint that was complete, damaged since or not."""
    return bool(completed(directory))


def damage_of(path: Path, content: bool = True, skip_memory: bool = False) -> str | None:
    """Damage as by `digests.damage_of`, with a look into the state."""
    damage = digests.damage_of(path, content, skip=MEMORY if skip_memory else None)
    return damage or _damage_of_state(path)


def _damage_of_state(path: Path) -> str | None:
    """Half a sentence about a state that is not one of this step; None for that of another format too."""
    file = path / STATE_FILE
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return f"{file} cannot be read ({error})"
    if not isinstance(content, dict):
        return f"{file} is no JSON object"
    if content.get("format") != FORMAT:
        return None
    state, layout = content.get("state"), content.get("layout")
    if not isinstance(state, dict) or not isinstance(layout, dict):
        return f"{file} has no state or no layout"
    if state.get("step") != _step(path):
        return f"{file} is of step {state.get('step')}, expected {_step(path)}"
    return None


def mark_complete(path: Path, taken: Mapping[str, str] | None = None) -> None:
    """Forces all files of a checkpoint to disk and writes its marker. `taken` are the digests that were taken while
    files were written; the other files are small and are read again."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    atomic.sync_tree(path)
    names = {str(file.relative_to(path)): file for file in files}
    manifest = Manifest(
        {name: file.stat().st_size for name, file in names.items()},
        {name: (taken or {}).get(name) or file_digest(file) for name, file in names.items()},
    )
    atomic.write_text(path / MARKER, manifest.write_text())
    atomic.sync(path.parent)


def publish(partial: Path, path: Path) -> None:
    """Gives a checkpoint that is complete its name."""
    remove(path)
    os.replace(partial, path)
    atomic.sync(path.parent)


def prune(directory: Path, keep_last: int, keep_every: int | None) -> list[Path]:
    """Removes all checkpoints that are older than the newest `keep_last` whole ones, but for those of steps that
    `keep_every` divides; returns the removed ones. Damaged ones do not count."""
    checkpoints = completed(directory)
    kept = [path for path in checkpoints if damage_of(path, content=False) is None][-keep_last:]
    older = checkpoints[: checkpoints.index(kept[0])] if len(kept) == keep_last else []
    removed = [path for path in older if not (keep_every and _step(path) % keep_every == 0)]
    for path in removed:
        remove(path)
    return removed


def remove(path: Path) -> None:
    """Removes a checkpoint, its marker first: what an interruption leaves is not taken for a checkpoint."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_incomplete(directory: Path) -> None:
    """Removes what saves and removals that were interrupted have left."""
    removed = [path for path in _steps(directory) if not (path / MARKER).is_file()]
    for path in [*removed, *directory.glob(".step_*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _steps(directory: Path) -> list[Path]:
    """Directories of checkpoints, complete or not, oldest first."""
    return sorted((path for path in directory.glob("step_*") if path.name[5:].isdigit()), key=_step)


def completed(directory: Path) -> list[Path]:
    """Checkpoints that were complete, damaged since or not, oldest first."""
    return [path for path in _steps(directory) if (path / MARKER).is_file()]


def _step(path: Path) -> int:
    return int(path.name[5:])
