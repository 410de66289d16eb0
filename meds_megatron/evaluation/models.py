"""The model that is evaluated: an exported directory, a checkpoint, or a run."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from meds_megatron.config import DataConfig
from meds_megatron.errors import UserError
from meds_megatron.evaluation.settings import files_digest
from meds_megatron.run.checkpoint_files import completed, damage_of
from meds_megatron.run.paths import RunPaths


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and the run that it is from."""

    path: Path
    """Hugging Face directory or checkpoint, absolute."""
    trained_on: DataConfig | None
    """Prompt settings of the run; None for a model of no run."""

    @property
    def name(self) -> str:
        """Last three parts of the path, as in the names of LIMO's outputs."""
        return "/".join(self.path.parts[1:][-3:])

    def hf_directory(self, cache: Path) -> Path:
        """The model as a Hugging Face directory; a checkpoint is converted to one below `cache`, once."""
        from meds_megatron.weights.conversion.checkpoint import is_checkpoint
        from meds_megatron.weights.conversion.convert import to_hf

        if not is_checkpoint(self.path):
            return self.path

        directory = cache / f"hf-{files_digest(self.path)[:12]}"
        if not directory.is_dir():
            to_hf(self.path, directory)
        return directory


def find_model(path: str) -> EvaluatedModel:
    """The model that a path names. Of a run it is the newest complete checkpoint, or the export of the same step.

    Raises UserError where there is none.
    """
    run = RunPaths(path)
    is_model = (run.path / "config.json").is_file()
    found = _newest(run) if run.config.is_file() and run.checkpoints.is_dir() and not is_model else run.path
    if not (found / "config.json").is_file():
        raise UserError(
            f"{path} has no model: give the directory of a run with checkpoints, a checkpoint, or a Hugging Face "
            "directory"
        )
    run = RunPaths(found.parents[1])
    is_of_a_run = found.parent in (run.exports, run.checkpoints) and run.config.is_file()
    return EvaluatedModel(found, _data_settings(run.config) if is_of_a_run else None)


def _data_settings(path: Path) -> DataConfig:
    """The `data` section of a run's settings; other sections may be those of another release."""
    saved = yaml.safe_load(path.read_text()).get("data", {})
    return DataConfig(**{field.name: saved[field.name] for field in fields(DataConfig) if field.name in saved})


def _newest(run: RunPaths) -> Path:
    """Newest export or whole checkpoint of a run; of the same step the export. Large files of a checkpoint are looked
    at when they are read."""
    complete = [path for path in completed(run.checkpoints) if _is_whole(path)]
    exports = [path.parent for path in run.exports.glob("step_*/config.json")]
    newest = max([*complete, *exports], key=lambda path: (path.name, path.parent == run.exports), default=None)
    if newest is None:
        raise UserError(
            f"{run.path} has neither a complete checkpoint nor an export: wait for the run's first checkpoint"
        )
    return newest


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there, and the small ones as they were written."""
    damage = damage_of(checkpoint)
    if damage:
        print(f"meds: {damage}: the checkpoint is passed over", file=sys.stderr)
    return damage is None
