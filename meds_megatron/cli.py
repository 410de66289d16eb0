"""The `meds` command: one thin function a sub-command, which imports what it runs when it is called."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from meds_megatron.commands.bench import bench
from meds_megatron.commands.convert import convert
from meds_megatron.commands.data import data
from meds_megatron.commands.evaluate import evaluate
from meds_megatron.commands.options import Command, with_config
from meds_megatron.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunFailed, Stopped, UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True})
@click.version_option(package_name="meds_megatron", message="%(prog)s %(version)s")
def cli() -> None:
    """Reinforcement learning of Qwen models with a memory of past mistakes (MEDS).

    Settings come from a YAML file (see configs/), and key=value after it override them: penalty.alpha=0.02.
    meds_megatron/config/schema.py explains every key.
    """


@cli.command(cls=Command, example="meds train configs/meds_qwen3_8b.yaml cluster.nodes=4 penalty.alpha=0.02 name=mine")
@with_config
def train(config) -> None:
    """Train a model.

    The run directory (run_dir, by default runs/NAME) gets config.yaml with all settings, metrics.jsonl with a line a
    step, rollouts/ with every response, hf/ with the trained model.

    SIGTERM, SIGUSR1 and Ctrl-C stop the run between two steps and save it; a second one ends it at once. The exit
    status is then 75 (put the run back into the queue), or 130 after Ctrl-C; the same command continues.
    """
    from meds_megatron.trainer.fork_servers import fork_servers

    with fork_servers(config) as servers:
        # The driver's own imports, in parallel with those of the servers.
        from meds_megatron.trainer.main import train

        train(config, servers)


@cli.command(cls=Command, example="meds plan configs/meds_qwen2.5_72b.yaml rollout.kv_cache_gib=40")
@click.option("--calibrate", metavar="RUN_DIR", help="Replace assumed times and lengths by those of a finished run.")
@click.option(
    "--network-gbit",
    type=click.FloatRange(min=0, min_open=True),
    help="Gbit/s of a node, each way.  [default: 3200 with GPUs]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_config
def plan(config, calibrate: str | None, network_gbit: float | None, as_json: bool) -> None:
    """Show what a run puts where, whether it fits, and how long a step takes.

    Needs no GPU and no model: the shapes of published Qwen2.5 and Qwen3 models are known by the last part of
    model.path. The exit status is 1 if the run does not fit; `meds train` then refuses it in the same words.
    """
    from meds_megatron.plan.plan import make_plan

    made = make_plan(config, calibrate, network_gbit)
    if as_json:
        click.echo(json.dumps(made.to_dict()))
    else:
        from rich.console import Console

        from meds_megatron.plan.render import show_plan

        show_plan(made, Console())
    if made.refusal:
        click.get_current_context().exit(EXIT_FAILURE)


@cli.command(cls=Command, example="meds check configs/quickstart.yaml")
@click.option("--links/--no-links", default=True, help="Measure an all-reduce between the ranks.")
@with_config
def check(config, links: bool) -> None:
    """Check the machines of a run before it starts.

    On every node: versions, devices, layer implementation, host name, free disk and shared memory, model and data
    readable, run directory writable; and the speed of the links in each parallel group. The exit status is 1 if
    something would fail. Every Slurm job runs it first, without the links.
    """
    from rich.console import Console
    from rich.table import Table

    from meds_megatron.preflight.check import check

    findings = check(config, links)
    table = Table("node", "what", "found", "")
    for finding in findings:
        table.add_row(finding.node, finding.what, finding.found, "ok" if finding.ok else "FAILS")
    Console().print(table)
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(EXIT_FAILURE)


@cli.command(cls=Command, example="meds sweep configs/sweeps/penalty_qwen7b.yaml")
@click.argument("file", metavar="SWEEP.yaml")
@click.option(
    "--executor",
    type=click.Choice(["auto", "slurm", "local"]),
    default="auto",
    help="Slurm jobs, or processes of this machine; auto is Slurm where there is an sbatch.",
)
def sweep(file: str, executor: Literal["auto", "slurm", "local"]) -> None:
    """Train the runs of a sweep: grids and lists over any settings, with several seeds.

    The table of results is shown as it grows and is in results.csv in the sweep's directory. Runs that fail are tried
    again, and a sweep that was interrupted continues where it stopped when it is started again. The exit status is 1 if
    a run failed for good. meds_megatron/sweeps/config.py explains every key of the file.
    """
    from meds_megatron.sweeps.run import sweep_with_live_table

    rows = sweep_with_live_table(file, executor)
    if any(row["state"] == "failed" for row in rows):
        click.get_current_context().exit(EXIT_FAILURE)


@cli.command(cls=Command, example="meds report runs/meds runs/dapo --out compared.html")
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True)
@click.option("--out", metavar="FILE", help="The page.  [default: report.html, in RUN_DIR if there is only one]")
@click.option(
    "--text-mib",
    type=click.FloatRange(min=0),
    default=64.0,
    help="Limit of the responses' texts in the page, before compression; the most typical come first.",
)
def report(run_dirs: Sequence[str], out: str | None, text_mib: float) -> None:
    """Write a page that shows runs: their curves, and the mistakes that the model keeps making.

    The page is one file that needs no network. Several runs are drawn over each other. A run need not be finished.
    """
    from meds_megatron.report.page import write_report

    out = out or str(Path(run_dirs[0] if len(run_dirs) == 1 else ".") / "report.html")
    write_report(run_dirs, out, text_mib)
    click.echo(out)


for command in (evaluate, data, convert, bench):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; what has a sentence for the user is printed as one line, without
    a traceback."""
    try:
        return cli.main(arguments, prog_name="meds", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except UserError as error:
        # An error raised in a Ray actor has Ray's traceback in its text; `cause` is the original.
        print(f"meds: {getattr(error, 'cause', error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stop:
        print(f"meds: {stop}", file=sys.stderr)
        return stop.exit_code
    except RunFailed as error:
        print(f"meds: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except (KeyboardInterrupt, click.Abort):
        print("meds: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
