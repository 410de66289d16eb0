"""Health of one engine as a state machine without I/O.

STARTING until the model is loaded, STALE until the engine has the policy's current weights, FRESH afterwards. A weight
update makes it STALE until its end, a sleep without weights until the next one; a failure makes it STARTING again.
"""

from dataclasses import dataclass
from enum import Enum

from meds_megatron.errors import UserError


class EngineState(Enum):
    STARTING = "starting"
    STALE = "stale"
    FRESH = "fresh"


@dataclass
class EngineHealth:
    engine: int
    max_failures: int
    """Failures in a row that are followed by a restart; a generated response sets the count back to 0."""
    state: EngineState = EngineState.STARTING
    failures_in_a_row: int = 0
    restarts: int = 0

    def started(self) -> None:
        self.state = EngineState.STALE

    def update_began(self) -> None:
        self.state = EngineState.STALE

    def weights_dropped(self) -> None:
        self.state = EngineState.STALE

    def updated(self) -> None:
        self.state = EngineState.FRESH

    def generated(self) -> None:
        self.failures_in_a_row = 0

    def failed(self, reason: str) -> None:
        """Counts a restart. Raises UserError when the engine has failed too often."""
        self.failures_in_a_row += 1
        if self.failures_in_a_row > self.max_failures:
            raise UserError(
                f"engine {self.engine} failed {self.failures_in_a_row} times in a row without having generated "
                f"anything, and rollout.max_failures is {self.max_failures}; the last error: {reason}"
            )
        self.state = EngineState.STARTING
        self.restarts += 1
