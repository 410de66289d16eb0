"""The `meds` command: one thin function a sub-command. What it runs is imported only when it is asked for."""

import functools
import json
import sys
import warnings
from collections.abc import Sequence

import click

from meds_megatron.errors import UserError

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Command(click.Command):
    """Keeps the line breaks of the examples in its help."""

    def __init__(self, *args, example: str, **kwargs):
        super().__init__(*args, epilog=f"\b\nExample:\n  {example}", **kwargs)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="meds_megatron", message="%(prog)s %(version)s")
def cli() -> None:
    """Reinforcement learning of Qwen models with a memory of past mistakes (MEDS).

    Settings come from a YAML file (see configs/), and key=value after it override them: penalty.alpha=0.02.
    meds_megatron/config/schema.py explains every key.
    """


def with_config(command):
    """The arguments CONFIG [KEY=VALUE]..., handed on as one checked Config."""

    @functools.wraps(command)
    def run(config: str, overrides: Sequence[str], **options):
        from meds_megatron.config import load_config
        from meds_megatron.config.validate import validate

        loaded = load_config(config, overrides)
        validate(loaded)
        return command(loaded, **options)

    return click.argument("config")(click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)(run))


def with_json(command):
    """Shows the dict that the command returns: as tables, or with --json as one JSON object on the last line.

    The exit status is 1 where the dict says that what was compared is not `equal`.
    """

    @functools.wraps(command)
    def run(as_json: bool, **arguments) -> None:
        result = command(**arguments)
        if as_json:
            click.echo(json.dumps(result))
        else:
            show(result)
        if result.get("equal") is False:
            click.get_current_context().exit(EXIT_FAILURE)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, last.")(run)


@cli.command(cls=Command, example="meds train configs/meds_qwen3_8b.yaml cluster.nodes=4 penalty.alpha=0.02 name=mine")
@with_config
def train(config) -> None:
    """Train a model.

    Everything the run leaves is in its run directory (run_dir, by default runs/NAME): config.yaml with all settings,
    metrics.jsonl with a line a step, rollouts/ with every response, hf/ with the trained model.
    """
    from meds_megatron.trainer.main import train

    train(config)


@cli.group()
def convert() -> None:
    """Turn models into checkpoints of megatron-core and back, and compare them."""
    # megatron-core tells at every import which optional packages it does without.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")


@convert.command("to-mcore", cls=Command, example="meds convert to-mcore models/Qwen3-8B checkpoints/Qwen3-8B")
@click.argument("hf")
@click.argument("out")
def to_mcore(hf: str, out: str) -> None:
    """Make the checkpoint OUT from the Hugging Face directory HF.

    OUT holds the weights in megatron-core's distributed format, in the dtypes of HF, for any layout to load, and
    HF's configuration and tokenizer. It needs no GPU, and memory for one layer or the embedding at a time.
    """
    from meds_megatron.weights.conversion.convert import to_mcore

    to_mcore(hf, out)


@convert.command("to-hf", cls=Command, example="meds convert to-hf checkpoints/step_000050 exported --dtype bfloat16")
@click.argument("checkpoint")
@click.argument("out")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="Of all weights.  [default: as saved]")
def to_hf(checkpoint: str, out: str, dtype: str | None) -> None:
    """Make the Hugging Face directory OUT from CHECKPOINT.

    CHECKPOINT may have been saved at any layout; its configuration and tokenizer go along, so that transformers and
    vLLM load OUT as they load the original model. It needs no GPU, and memory for about one layer or the embedding at
    a time.
    """
    import torch

    from meds_megatron.weights.conversion.convert import to_hf

    to_hf(checkpoint, out, None if dtype is None else getattr(torch, dtype))


@convert.command(cls=Command, example="meds convert verify models/Qwen3-8B checkpoints/Qwen3-8B --text problems.txt")
@click.argument("a")
@click.argument("b")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Largest difference of a weight, in whatever dtype.  [default: the same bits]",
)
@click.option("--text", type=click.File(encoding="utf-8"), help="Text for the log-probs.  [default: a built-in one]")
@click.option(
    "--logprob-limit", type=click.FloatRange(min=0), default=1e-4, show_default=True, help="Largest difference of one."
)
@click.option("--weights-only", is_flag=True, help="Leave the log-probs out.")
@with_json
def verify(a: str, b: str, tolerance: float | None, text, logprob_limit: float, weights_only: bool) -> dict:
    """Compare the models A and B.

    Each is a Hugging Face directory or a checkpoint. First all weights are compared, one tensor at a time, then the
    log-probs that transformers gives to a text with one model after the other in memory, in float32 (a checkpoint is
    converted to a temporary directory for it, under TMPDIR). The exit status is 1 if they differ.
    """
    from meds_megatron.weights.conversion.verify import SAMPLE_TEXT, verify

    if weights_only:
        return verify(a, b, tolerance, text=None)
    return verify(a, b, tolerance, text.read() if text else SAMPLE_TEXT, logprob_limit)


@cli.group()
def bench() -> None:
    """Measure a part of a run on this machine."""


@bench.command(cls=Command, example="meds bench rollout configs/quickstart.yaml --json")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Generations of each engine after the warm-up.",
)
@with_json
@with_config
def rollout(config, rounds: int) -> dict:
    """Tokens a second of a run's engine against plain vLLM.

    Both generate the responses of one step's prompts, in turn, with the same model and sampling.
    """
    from meds_megatron.bench.step import rollout

    return rollout(config, rounds)


@bench.command(cls=Command, example="meds bench step configs/quickstart.yaml --steps 5 --json")
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps measured after one of warm-up."
)
@with_json
@with_config
def step(config, steps: int) -> dict:
    """Seconds of a training step, by phase.

    Trains as `meds train` would, and keeps neither the model nor the run.
    """
    from meds_megatron.bench.step import step

    return step(config, steps)


@bench.command(cls=Command, example="meds bench fingerprint --responses 8 --tokens 64 --json")
@click.option("--responses", type=click.IntRange(min=1), default=8, show_default=True, help="Answers with one.")
@click.option("--tokens", type=click.IntRange(min=4), default=64, show_default=True, help="Length of each sequence.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Forward passes of each kind.")
@with_json
def fingerprint(responses: int, tokens: int, rounds: int) -> dict:
    """What fingerprints cost a forward pass.

    At the shape of Qwen2.5-0.5B with random weights, on two CPU pipeline stages: the pass without, with ours, and with
    all hidden states kept and the full head run on every layer.
    """
    from meds_megatron.bench.fingerprint import run

    return run(responses=responses, tokens=tokens, rounds=rounds)


@bench.command(cls=Command, example="meds bench memory --history 64 --history 1600 --json")
@click.option(
    "--history",
    "histories",
    type=click.IntRange(min=2),
    multiple=True,
    default=(16, 64, 256, 1600),
    show_default=True,
    help="Vectors already stored of a problem; can be given several times.",
)
@click.option("--keys", type=click.IntRange(min=1), default=512, show_default=True, help="Problems in a step.")
@click.option("--new", type=click.IntRange(min=1), default=12, show_default=True, help="Vectors a problem adds.")
@with_json
def memory(histories: Sequence[int], keys: int, new: int) -> dict:
    """What the memory of mistakes costs a step.

    Against a version that clusters from scratch, over several shards, and with a million problems; in processor seconds
    of one thread.
    """
    from meds_megatron.bench.memory import run

    return run(histories=histories, keys=keys, new=new)


@bench.command(cls=Command, example="meds bench reshard --json")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Updates of each kind.")
@click.option("--network-gbit", type=float, default=400.0, show_default=True, help="Gbit/s of a node, each way.")
@click.option("--local-gbyte", type=float, default=100.0, show_default=True, help="GB/s between GPUs of a node.")
@with_json
def reshard(rounds: int, network_gbit: float, local_gbyte: float) -> dict:
    """What new weights for the engines cost.

    At the shape of Qwen2.5-0.5B on CPU, from TP2 x PP2 to an engine of TP2: our plan against gathering everything. And
    what an update of 7B, 32B and 72B models moves, with the time that it takes at least.
    """
    from meds_megatron.bench.reshard import run
    from meds_megatron.bench.reshard_forecast import forecasts

    return run(rounds=rounds) | {"plans": forecasts(network_gbit, local_gbyte)}


def show(result: dict, indent: str = "") -> None:
    """A result on the terminal: a line a number, a table for a list of rows."""
    for name, value in result.items():
        if isinstance(value, dict):
            click.echo(f"{indent}{name}")
            show(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            click.echo(f"{indent}{name}")
            rows = [list(value[0]), *([_cell(cell) for cell in row.values()] for row in value)]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                click.echo(f"{indent}  {'  '.join(cells)}")
        else:
            click.echo(f"{indent + name:<28} {_cell(value)}")


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _is_dead_actor(error: Exception) -> bool:
    """Whether Ray lost an actor; Ray is only asked where it has been imported, which a quick command never does."""
    ray = sys.modules.get("ray")
    return ray is not None and isinstance(error, ray.exceptions.RayActorError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; a mistake of the user is one line, without a traceback."""
    try:
        return cli.main(arguments, prog_name="meds", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except UserError as error:
        # Where an actor of Ray found the mistake, `cause` is its own error, without Ray's traceback in the text.
        print(f"meds: {getattr(error, 'cause', error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (KeyboardInterrupt, click.Abort):
        print("meds: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if not _is_dead_actor(error):
            raise
        print(f"meds: a process of the run died; what it said is above, or in Ray's logs: {error}", file=sys.stderr)
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
