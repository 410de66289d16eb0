"""The model that is evaluated: an exported directory, a checkpoint, or a run."""

from dataclasses import dataclass
from pathlib import Path

from meds_megatron.config import Config, load_config
from meds_megatron.errors import UserError
from meds_megatron.evaluation.settings import files_digest


@dataclass(frozen=True)
class EvaluatedModel:
    """A model, and the run that it is from."""

    path: Path
    """Hugging Face directory or checkpoint, absolute."""
    run_config: Config | None
    """Settings of the run; None for a model of no run."""

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
    return EvaluatedModel(found, load_config(settings) if is_of_a_run else None)


def _newest(run: Path) -> Path:
    """Newest export or checkpoint of a run; of the same step the export."""
    complete = [path.parent for path in (run / "checkpoints").glob("step_*/complete.json")]
    exports = [path.parent for path in (run / "hf").glob("step_*/config.json")]
    newest = max([*complete, *exports], key=lambda path: (path.name, path.parent.name == "hf"), default=None)
    if newest is None:
        raise UserError(f"{run} has neither a complete checkpoint nor an export: wait for the run's first checkpoint")
    return newest
