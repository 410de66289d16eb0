"""The study's finished runs: a line of measures for each, found again by its settings."""

import hashlib
import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from study_measures import measure, validations
from study_plan import CONFIGS

from meds_megatron import atomic
from meds_megatron.config import Config, load_config
from meds_megatron.config.changes import is_free_to_change, make_another_run, settings_of
from meds_megatron.errors import UserError
from meds_megatron.run.reader import read_run
from meds_megatron.sweeps.config import SEED, SweepRun

RECORDS = "runs.jsonl"
MEASURED_BY = {
    "train.steps",
    "data.validation",
    "data.limit_validation",
    "rollout.validation_temperature",
    "rollout.validation_top_p",
    "rollout.validation_responses",
}
"""Settings that a run may be resumed with and that change its measures."""


def record(directory: Path, run: SweepRun) -> dict[str, Any]:
    """Adds a finished run to the records; its line. Raises UserError for a run that was made with other settings."""
    files = read_run(run.directory)
    _check_settings(run)
    line = {
        "task": files.settings["data.arithmetic_rules"],
        "method": method_of(run),
        "seed": run.differences[SEED],
        "steps": run.steps,
        "settings": digest(run),
        "code": _commit(),
        "measures": {name: None if value is None else round(value, 5) for name, value in measure(files).items()},
        "validation": validations(files),
    }
    path = directory / RECORDS
    with FileLock(directory / f".{RECORDS}.lock"):
        before = path.read_text() if path.exists() else ""
        atomic.write_text(path, before + json.dumps(line) + "\n")
    return line


def _check_settings(run: SweepRun) -> None:
    made = load_config(run.directory / "config.yaml")
    if other := make_another_run(made, run.config, also=MEASURED_BY):
        raise UserError(
            f"{run.directory}: this finished run has other settings than the plan ({'; '.join(other)}); remove it, or "
            "plan runs in another directory (plan --runs)."
        )


def _commit() -> str:
    """The commit at the time of recording; with `-dirty` where files that decide a run differ from it."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", CONFIGS.parent, *arguments], capture_output=True, text=True)

    unchanged = git("diff", "--quiet", "HEAD", "--", "meds_megatron", "configs").returncode == 0
    return git("rev-parse", "HEAD").stdout.strip() + ("" if unchanged else "-dirty")


def read_records(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The recorded runs by the digest of their settings: several where machines have made different models.

    Runs of the same settings and start are one run, however often it was made.
    """
    path = directory / RECORDS
    records: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            run = {"seed": line["seed"], "start": line["validation"].get("0"), "measures": dict(line["measures"])}
            same = records[line["settings"]]
            if run["start"] not in [other["start"] for other in same]:
                same.append(run)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number}: expected a JSON object of a run; remove the line.") from error
    return records


def digest(run: SweepRun) -> str:
    """Hash of the settings that decide a run's measures, those with the schema's default value aside: a setting that is
    new and off changes nothing."""
    defaults = settings_of(Config())
    values = settings_of(run.config)
    deciding = {
        key: value
        for key, value in values.items()
        if value != defaults[key] and (key in MEASURED_BY or not is_free_to_change(key))
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def method_of(run: SweepRun) -> str:
    return run.name.rpartition(",")[0]


def is_finished(run: SweepRun) -> bool:
    if not (run.directory / "metrics.jsonl").is_file():
        return False
    last = read_run(run.directory).metrics[-1:]
    return bool(last) and last[0]["step"] == run.steps and "validation/pass@1" in last[0]
