"""Options that commands share, and how a command shows its result."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import click

from meds_megatron.errors import EXIT_FAILURE


class Integers(click.ParamType):
    """Whole numbers from 1 on, separated by commas."""

    name = "integers"

    def convert(self, value, param, ctx) -> list[int]:
        if isinstance(value, list):
            return value
        numbers = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
        if min(numbers) < 1:
            self.fail(f"{value!r}: expected whole numbers from 1 on, separated by commas", param, ctx)
        return numbers


INTEGERS = Integers()


class Command(click.Command):
    """A command whose help ends with an example."""

    def __init__(self, *, example: str, **kwargs: Any):
        super().__init__(**kwargs, epilog=f"\b\nExample:\n  {example}")


def with_config(command):
    """Adds the arguments CONFIG [KEY=VALUE]... and passes the command one validated Config."""

    @functools.wraps(command)
    def run(config: str, overrides: Sequence[str], **options):
        from meds_megatron.config import load_config
        from meds_megatron.config.validate import validate

        loaded = load_config(config, overrides)
        validate(loaded)
        return command(loaded, **options)

    return click.argument("config")(click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)(run))


def with_json(command):
    """Prints the dict that the command returns: as tables, or with --json as one JSON object on the last line.

    The exit status is 1 if the dict has the key `equal` and it is false.
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


def show(result: dict, indent: str = "") -> None:
    """Print a result: a line for each value, a table for each list of rows."""
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
