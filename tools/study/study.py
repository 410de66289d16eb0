"""Study of MEDS and its rivals on the two toy tasks: runs, measures, a table and a picture.

    python tools/study/study.py plan DIR            # writes sweep files: per_kind, remainder, confirmation, departures
    python tools/study/study.py run DIR             # trains what is not recorded; --executor slurm for Slurm jobs
    python tools/study/study.py results DIR         # writes DIR/results.md and DIR/results.png

`DIR/runs.jsonl` has a line for every finished run: its measures (`study_measures.py`), a digest of its settings and the
commit at which it was recorded. Runs themselves are in a directory of their own (`plan --runs`) and are not needed
afterwards: `run` leaves out what is recorded with the same settings, `results` reads the records alone, and records of
other settings count in neither. So the files of DIR carry a study from one machine to another. In each sweep, runs of
the first seed come first, then those of the second: whatever is finished compares all methods.

The first two sweeps train all methods on a task each. The confirmation trains DAPO and two forms of MEDS on the second
task with other seeds and measures them on more problems. The last shows the effect of each of our departures on the
published method on the second task (`study_departures.py`).

A sweep file can also be given to `meds sweep`; `run` then records what is finished. All runs of a task draw equally
many responses: one generation batch a step, of which a group filter trains on a part.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from study_plan import METHODS, RUNS, SEEDS, STEPS, SWEEPS, planned_runs, planned_sweep
from study_records import digest, is_finished, method_of, read_records, record
from study_results import collect_results, draw, table_of

from meds_megatron import atomic
from meds_megatron.errors import UserError
from meds_megatron.sweeps.config import SweepRun, expand, load_sweep
from meds_megatron.sweeps.run import ExecutorName, sweep


def write_plan(directory: Path, runs: Path, steps: int, more: list[str], **options: Any) -> None:
    """A sweep file for each of SWEEPS. `more` are `key=value` settings of all runs, the rest as in `planned_sweep`.
    Raises UserError, and leaves the files as they were, for settings that no run can use."""
    settings: dict[str, Any] = {}
    for setting in more:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"{setting}: expected key=value, a setting of all runs.")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{setting}: the value is not readable as YAML; quote it.") from error
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        name: yaml.safe_dump(planned_sweep(name, directory, runs, steps, settings, **options), sort_keys=False)
        for name in SWEEPS
    }
    for name, text in texts.items():
        checked = directory / f".checked-{name}.yaml"
        atomic.write_text(checked, text)
        try:
            expand(load_sweep(checked), directory / f"{name}.yaml")
        finally:
            checked.unlink()
    for name, text in texts.items():
        atomic.write_text(directory / f"{name}.yaml", text)


def run_missing(directory: Path, sweeps: list[str], methods: list[str] | None, executor: ExecutorName) -> bool:
    """Trains what is planned (of `methods`, if given) and not recorded, and records each run as it ends. False if one
    failed."""
    planned = dict(planned_runs(directory, name) for name in sweeps)
    known = sorted({method_of(run) for runs in planned.values() for run in runs})
    if unknown := set(methods or []) - set(known):
        raise UserError(f"{directory}: no sweep has runs of {sorted(unknown)[0]}; expected some of {', '.join(known)}.")
    fine = True
    for path, runs in planned.items():
        recorded = read_records(directory)
        chosen = [run for run in runs if method_of(run) in (methods or known)]
        missing = {run.name: run for run in chosen if digest(run) not in recorded}

        def record_finished(_: Any = None, missing: dict[str, SweepRun] = missing) -> None:
            for run in [run for run in missing.values() if is_finished(run)]:
                print(json.dumps(record(directory, missing.pop(run.name))), flush=True)

        record_finished()
        if missing:
            rows = sweep(path, executor, record_finished, only=set(missing))
            record_finished()
            fine &= all(row["state"] == "finished" for row in rows)
            if unmeasured := [row["run"] for row in rows if row["state"] == "finished" and row["run"] in missing]:
                raise UserError(
                    f"{path}: the run {unmeasured[0]} ended without a validation after its last step, so that it "
                    "cannot be measured; plan it with train.validate_every above 0."
                )
    return fine


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    directory = given.directory
    try:
        if given.command == "plan":
            options = {name: getattr(given, name) for name in ("seeds", "concurrent", "methods")}
            write_plan(directory, given.runs, given.steps, given.set, **options)
        elif given.command == "run":
            return int(not run_missing(directory, given.sweeps, given.methods, given.executor))
        else:
            found = collect_results(directory)
            atomic.write_text(directory / "results.md", table_of(found))
            draw(found, directory / "results.png")
            print(table_of(found))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    plan, run, results = (commands.add_parser(name) for name in ("plan", "run", "results"))
    for command in (plan, run, results):
        command.add_argument("directory", type=Path)
    plan.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="of the two tasks' sweeps"
    )
    run.add_argument("--methods", nargs="+", help="some of the runs in the sweep files; default: all")
    plan.add_argument("--runs", type=Path, default=RUNS, help="directory of the runs")
    plan.add_argument("--steps", type=int, default=STEPS)
    plan.add_argument("--seeds", type=int, default=SEEDS)
    plan.add_argument("--concurrent", type=int, default=1, help="runs at a time")
    plan.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all runs")
    run.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    run.add_argument("--executor", choices=["auto", "local", "slurm"], default="local")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
