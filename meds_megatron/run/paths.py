"""Names of the files of a run."""

from pathlib import Path


class RunPaths:
    """The files in the directory of a run; the constructor only names them."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def functions(self) -> Path:
        """Digests of the files of the functions that the config names."""
        return self.path / "functions.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    def rollouts_of(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.parquet"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:06d}"

    @property
    def exports(self) -> Path:
        return self.path / "hf"

    def hf_export(self, step: int) -> Path:
        return self.exports / f"step_{step:06d}"

    @property
    def report(self) -> Path:
        return self.path / "report.html"
