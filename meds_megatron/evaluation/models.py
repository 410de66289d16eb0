"""The model that is evaluated: an exported directory, a checkpoint, or a run."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from meds_megatron.config import DataConfig
from meds_megatron.digests import MARKER, damage_of
from meds_megatron.errors import UserError
from meds_megatron.evaluation.settings import files_digest


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and the run that it is from."""

    path: Path
    """Hugging Face directory or checkpoint, absolute."""
    trained_on: DataConfig | None
    """How the run made its prompts; None for a model of no run."""

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
    given = Path(path).expanduser().absolute()
    if (given / "config.yaml").is_file() and (given / "checkpoints").is_dir() and not (given / "config.json").is_file():
        found = _newest(given)
    else:
        found = given
    if not (found / "config.json").is_file():
        raise UserError(
            f"{path} has no model: give the directory of a run with checkpoints, a checkpoint, or a Hugging Face "
            "directory"
        )
    settings = found.parents[1] / "config.yaml"
    is_of_a_run = found.parent.name in ("hf", "checkpoints") and settings.is_file()
    return EvaluatedModel(found, _data_settings(settings) if is_of_a_run else None)


def _data_settings(path: Path) -> DataConfig:
    """The `data` section of a run's settings; other sections may be those of another release."""
    saved = yaml.safe_load(path.read_text()).get("data", {})
    return DataConfig(**{field.name: saved[field.name] for field in fields(DataConfig) if field.name in saved})


def _newest(run: Path) -> Path:
    """Newest export or whole checkpoint of a run; of the same step the export. Large files of a checkpoint are looked
    at when they are read."""
    complete = [path.parent for path in (run / "checkpoints").glob(f"step_*/{MARKER}") if _is_whole(path.parent)]
    exports = [path.parent for path in (run / "hf").glob("step_*/config.json")]
    newest = max([*complete, *exports], key=lambda path: (path.name, path.parent.name == "hf"), default=None)
    if newest is None:
        raise UserError(f"{run} has neither a complete checkpoint nor an export: wait for the run's first checkpoint")
    return newest


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there, and the small ones as they were written."""
    damage = damage_of(checkpoint)
    if damage:
        print(f"meds: {damage}: the checkpoint is passed over", file=sys.stderr)
    return damage is None
