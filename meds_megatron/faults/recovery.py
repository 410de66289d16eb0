"""Recovery from a failed attempt at a run, as a state machine without I/O."""

from dataclasses import dataclass
from enum import Enum


class Failure(Enum):
    """Kind of failure."""

    DIED = "died"
    """A trainer rank or a memory shard, or the node, GPU or network under it."""
    HUNG = "hung"
    """Nothing progressed."""
    NO_NODES = "no nodes"
    """The cluster does not have the nodes of the run."""
    RAY_DIED = "Ray died"
    """Processes of Ray itself, without which the driver cannot continue."""


class Decision(Enum):
    RESTART = "restart"
    """Restart from the last checkpoint, on the same cluster; on a new Ray where that of the run's own died."""
    REQUEUE = "requeue"
    """End the process with the exit code on which schedulers start it again."""
    STOP = "stop"


@dataclass
class Recovery:
    """Attempts are repeated after a death or a hang, but at most `max_restarts` times in a row without progress.

    Progress is a step beyond all that any attempt has finished: steps that are repeated from a checkpoint are none.
    """

    max_restarts: int
    furthest: int
    """Highest finished step; at first that of earlier processes."""
    owns_ray: bool = False
    """Whether Ray is the run's own and can be started again."""
    in_a_row: int = 0
    """Restarts since the last progress."""
    progressed: bool = False
    """Whether this process has made progress."""
    stopping: bool = False

    def finished(self, step: int) -> None:
        """Step `step` is finished."""
        if step > self.furthest:
            self.furthest, self.in_a_row, self.progressed = step, 0, True

    def stop_requested(self) -> None:
        """A signal stops the run."""
        self.stopping = True

    def failed(self, failure: Failure) -> Decision:
        """An attempt failed."""
        if self.stopping or (failure is Failure.RAY_DIED and not self.owns_ray):
            return Decision.REQUEUE
        if failure is Failure.NO_NODES:
            # After progress a node has been lost. Without any, the config asks for more than there is, or it does not
            # help to start again, and a job that is requeued for ever would never report it.
            return Decision.REQUEUE if self.progressed else Decision.STOP
        if self.in_a_row >= self.max_restarts:
            return Decision.STOP
        self.in_a_row += 1
        return Decision.RESTART
