"""The file of a sweep: which runs, on what, how many at a time."""

import difflib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from meds_megatron.config import Config, load_config
from meds_megatron.config.functions import resolve_functions
from meds_megatron.config.load import nearest_key, schema_types
from meds_megatron.config.validate import validate
from meds_megatron.errors import UserError

SEED = "train.seed"


@dataclass
class SweepJobConfig:
    """The Slurm job of each run, as in slurm/*.sbatch."""

    nodes: int = 1
    gpus_per_node: int = 8
    """0 for runs without GPUs. With local processes: GPUs of each run, where the machine has GPUs."""
    cpus_per_task: int | None = None
    memory: str | None = None
    """Memory of a node, as sbatch --mem takes it; null is all of it with `exclusive`, else Slurm's default."""
    exclusive: bool = True
    hours: float = 24.0
    save_seconds: int = 600
    """Seconds before the time is up for the run to save itself; the job is then requeued."""
    partition: str | None = None
    account: str | None = None
    python: str = ""
    """Python of the job, in the container if there is one; empty is the current one."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, such as those of a container."""


@dataclass
class SweepConfig:
    """A sweep: every combination of `grid`, or else every entry of `runs`, each with every seed."""

    name: str = ""
    """Default: that of the file."""
    config: str = ""
    """The runs' config, relative to the sweep's file."""
    directory: str = ""
    """Directory of the runs and the table; default: runs/NAME."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs: any keys of a config."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values of keys, of which every combination is a run."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of single runs by name; with a grid, each of them has all of its combinations."""
    seeds: list[int] = field(default_factory=lambda: [0])
    metrics: list[str] = field(default_factory=lambda: ["accuracy/mean", "validation/accuracy"])
    """Columns of the table: the last value of each."""
    concurrent: int = 4
    """Runs at a time."""
    retries: int = 1
    """Further attempts at a run that failed."""
    job: SweepJobConfig = field(default_factory=SweepJobConfig)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    differences: dict[str, Any]
    """Settings in which the runs differ."""
    arguments: list[str]
    """Arguments of `meds train`."""
    directory: Path
    config: Config
    """Config that `arguments` make."""

    @property
    def steps(self) -> int:
        return self.config.train.steps


def load_sweep(path: str | Path) -> SweepConfig:
    """The sweep in a YAML file. Raises UserError for an unknown key or a wrong type."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such sweep file; give the path of a YAML file.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level.")
    _check_names(values, SweepConfig, path, "")
    if isinstance(values.get("job"), dict):
        _check_names(values["job"], SweepJobConfig, path, "job.")
    try:
        sweep = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), values))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(sweep, SweepConfig)
    _check_ranges(sweep, path)
    if not sweep.config:
        raise UserError(f"{path}: config is not set; name the runs' config, relative to this file.")
    sweep.name = sweep.name or path.stem
    sweep.config = str((path.parent / sweep.config).resolve())
    sweep.directory = str(Path(sweep.directory or f"runs/{sweep.name}").expanduser().absolute())
    return sweep


def _check_names(values: dict, section: type, path: Path, prefix: str) -> None:
    known = [entry.name for entry in fields(section)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean `{prefix}{close[0]}`?" if close else f"expected one of {', '.join(known)}."
            raise UserError(f"{path}: unknown key `{prefix}{name}`; {hint}")


def _check_ranges(sweep: SweepConfig, path: Path) -> None:
    least = {
        "concurrent": 1,
        "retries": 0,
        "job.nodes": 1,
        "job.gpus_per_node": 0,
        "job.cpus_per_task": 1,
        "job.hours": 1 / 60,
        "job.save_seconds": 1,
    }
    for key, bound in least.items():
        value = OmegaConf.select(OmegaConf.structured(sweep), key)
        if value is not None and value < bound:
            raise UserError(f"{path}: {key} is {value}, expected {bound:.3g} or more.")
    for key, empty in {
        "seeds": not sweep.seeds,
        **{f"grid.{key}": not value for key, value in sweep.grid.items()},
    }.items():
        if empty:
            raise UserError(f"{path}: {key} is an empty list, so there is no run; give it a value.")


def expand(sweep: SweepConfig, path: str | Path) -> list[SweepRun]:
    """All runs, each with a valid config. Raises UserError for a key that no config has, and for the first run whose
    config is not valid."""
    runs = []
    for name, differences in _combinations(sweep):
        for key in (*sweep.settings, *differences):
            if key not in schema_types():
                nearest = nearest_key(key)
                raise UserError(f"{path}: unknown key `{key}`" + (f"; did you mean `{nearest}`?" if nearest else "."))
        directory = Path(sweep.directory) / name
        settings = {**sweep.settings, **differences, "name": f"{sweep.name}.{name}", "run_dir": str(directory)}
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        try:
            config = load_config(sweep.config, overrides)
            validate(config)
            resolve_functions(config)
        except UserError as error:
            raise UserError(f"{path}: the run {name}: {error}") from error
        runs.append(SweepRun(name, differences, [sweep.config, *overrides], directory, config))
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"{path}: more than one run is {sorted(twice)[0]}; leave a value or a seed out that is there twice."
        )
    return runs


def _combinations(sweep: SweepConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and differing settings of every run."""
    for label, own in (sweep.runs or {"": {}}).items():
        for values in itertools.product(*sweep.grid.values()):
            for seed in sweep.seeds:
                varied = {**dict(zip(sweep.grid, values, strict=True)), SEED: seed}
                labels = [_label(key, value) for key, value in varied.items()]
                yield ",".join([label, *labels] if label else labels), {**own, **varied}


def _label(key: str, value: Any) -> str:
    """`alpha=0.1`: part of the name of a directory."""
    text = json.dumps(value).strip('"')
    return f"{key.rpartition('.')[2]}=" + "".join(
        letter if letter.isalnum() or letter in "._-" else "_" for letter in text
    )
