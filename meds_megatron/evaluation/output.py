"""The output of an evaluation: a JSONL file with the settings in its first row and a row for each problem after it.

While problems are being generated their rows are in a file of the same name with `.partial` behind it, in the order in
which they are finished; a row that an interruption cut off is dropped. The output itself is in the order of the data.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meds_megatron import atomic
from meds_megatron.errors import UserError
from meds_megatron.evaluation.records import HEADER


def write_rows(path: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Writes the whole output; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.open_atomic(path, newline="\n") as file:
        for row in ({HEADER: settings}, *rows):
            file.write(_line(row))


class PartialOutput:
    """The rows of the problems that are finished, by their place in the data; rows survive an interruption."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        """Reads what an interrupted evaluation of the same settings has left. Raises UserError for other settings."""
        self._path = path.with_name(f"{path.name}.partial")
        self.rows: dict[int, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        continues = self._path.is_file() and self._read(settings)
        self._file = open(self._path, "a" if continues else "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        if not continues:
            self._append({HEADER: settings})

    def _read(self, settings: dict[str, Any]) -> bool:
        """Reads the whole lines of the file and cuts off a torn one; False if there is not even the settings."""
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return False
        os.truncate(self._path, len(whole))
        header, *lines = [json.loads(line) for line in whole.split(b"\n") if line]
        check_settings(self._path, header[HEADER], settings)
        self.rows = {line["place"]: line["row"] for line in lines}
        return True

    def add(self, place: int, row: dict[str, Any]) -> None:
        """Adds the row of the problem at that place of the data."""
        self.rows[place] = row
        self._append({"place": place, "row": row})

    def _append(self, content: dict[str, Any]) -> None:
        self._file.write(_line(content))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Removes the file, when the output has all of it."""
        self._path.unlink()


def read_output(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a finished output, None if there is none. Raises UserError for one of other settings."""
    if not path.is_file():
        return None
    header, *rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    check_settings(path, header.get(HEADER), settings)
    return rows


def check_settings(path: Path, found: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    """Raises UserError when an output was made with other settings than those expected."""
    if found != expected:
        found = found or {}
        names = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        raise UserError(
            f"{path} was made with another {', '.join(sorted(names))}: remove it, or choose another --output-dir"
        )


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
