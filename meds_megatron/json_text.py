"""JSON that others wrote."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for all that is none, a text that is nested too deep among it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
