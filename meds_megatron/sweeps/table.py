"""The table of a sweep: a row a run, on the terminal and as a csv file."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from meds_megatron import atomic


def table_of(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows, each with a value of `run`, for the terminal."""
    table = Table(title=title)
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "run"))
    for column in ("run", *columns):
        table.add_column(column.rpartition(".")[2])
    for row in rows:
        table.add_row(row["run"], *(_cell(row.get(column)) for column in columns))
    return table


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the rows; the file appears whole or not at all."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with atomic.open_atomic(path, newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
