"""Which engines may be used, as a state machine without any I/O.

An engine starts, is stale until it has been given the policy's weights, and is then fresh; a weight update makes it
stale until its end. An engine that fails is started anew, and so begins again.
"""

from enum import Enum

from meds_megatron.errors import UserError


class Health(Enum):
    STARTING = "starting"
    STALE = "stale"
    FRESH = "fresh"


class Fleet:
    """The health of every engine of a run."""

    def __init__(self, engines: int, max_failures: int):
        """`max_failures`: how often in a row one engine may fail without having generated anything."""
        self.health = [Health.STARTING] * engines
        self._max_failures = max_failures
        self._failures = [0] * engines
        self.restarts = 0
        """Of all engines, since the run began."""

    def having(self, *states: Health) -> list[int]:
        """The engines in one of the states."""
        return [engine for engine, health in enumerate(self.health) if health in states]

    def started(self, engine: int) -> None:
        self.health[engine] = Health.STALE

    def update_began(self, engine: int) -> None:
        self.health[engine] = Health.STALE

    def filled(self, engine: int) -> None:
        self.health[engine] = Health.FRESH

    def generated(self, engine: int) -> None:
        self._failures[engine] = 0

    def failed(self, engine: int, reason: str) -> None:
        """The engine is started anew. Raises UserError when it has failed too often."""
        self._failures[engine] += 1
        if self._failures[engine] > self._max_failures:
            raise UserError(
                f"engine {engine} failed {self._failures[engine]} times in a row without having generated anything, "
                f"and rollout.max_failures is {self._max_failures}; its last words: {reason}"
            )
        self.health[engine] = Health.STARTING
        self.restarts += 1
