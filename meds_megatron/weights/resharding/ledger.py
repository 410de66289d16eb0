"""Which parameters of a weight update have come: each exactly once."""

from collections.abc import Iterable

MOST_NAMED = 5


class UpdateLedger:
    """Counts off the `expected` names of one update."""

    def __init__(self, expected: Iterable[str]):
        self._missing = set(expected)
        self._taken: set[str] = set()

    def take(self, name: str) -> None:
        """Notes that a parameter has come. Raises ValueError when it came before or does not belong."""
        if name in self._taken:
            raise ValueError(f"{name} came twice in one weight update")
        if name not in self._missing:
            raise ValueError(f"{name} came in a weight update, and the model has no such parameter")
        self._missing.remove(name)
        self._taken.add(name)

    def check_complete(self) -> None:
        """Raises ValueError, naming them, when parameters have not come."""
        if self._missing:
            names = sorted(self._missing)
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise ValueError(f"the weight update lacks {', '.join(names[:MOST_NAMED])}{more}")
