"""The `meds` command: one thin function a sub-command. What it runs is imported only when it is asked for."""

import sys
from collections.abc import Sequence

import click

from meds_megatron.errors import UserError

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

    def run(config: str, overrides: Sequence[str], **options):
        from meds_megatron.config import load_config
        from meds_megatron.config.validate import validate

        loaded = load_config(config, overrides)
        validate(loaded)
        return command(loaded, **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return click.argument("config")(click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)(run))


@cli.command(cls=Command, example="meds train configs/meds_qwen3_8b.yaml cluster.nodes=4 penalty.alpha=0.02 name=mine")
@with_config
def train(config) -> None:
    """Train a model.

    Everything the run leaves is in its run directory (run_dir, by default runs/NAME): config.yaml with all settings,
    metrics.jsonl with a line a step, rollouts/ with every response, hf/ with the trained model.
    """
    from meds_megatron.trainer.main import train

    train(config)


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


if __name__ == "__main__":
    sys.exit(main())
