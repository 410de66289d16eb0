"""The metrics file of a run, `metrics.jsonl`: a JSON object a step."""

from dataclasses import dataclass
from pathlib import Path

from meds_megatron.errors import UserError
from meds_megatron.json_text import parse_json


@dataclass(frozen=True)
class MetricsLine:
    step: int
    values: dict[str, float | None]
    """Values by metric, `step` among them; None for one that was not finite."""
    text: str


def read_metrics(path: Path) -> list[MetricsLine]:
    """Every whole line; those at the end that a crash of the machine left damaged, or that is being written, are left
    out. Raises UserError for a damaged one before a whole one, and FileNotFoundError."""
    lines: list[MetricsLine] = []
    damaged = None
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        values = _values(line)
        if values is None:
            damaged = damaged or number
        elif damaged:
            raise UserError(f"{path} line {damaged}: expected a JSON object with a `step` and numbers; remove the line")
        else:
            lines.append(MetricsLine(values["step"], values, line.decode()))
    return lines


def _values(line: bytes) -> dict | None:
    """Values of a line; None for one that is not of metrics."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or not all(isinstance(value, int | float | None) for value in values.values()):
        return None
    step = values.get("step")
    return values if isinstance(step, int) and not isinstance(step, bool) else None
