"""The pool's record of an engine, and the end of one that makes no progress."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray

from meds_megatron.faults.supervised import Activity, dump_stacks
from meds_megatron.processes import kill_tree
from meds_megatron.rollout.engine import MAY_WAIT, Request
from meds_megatron.rollout.health import EngineHealth, EngineState

HUNG_SECONDS = 30
"""Time for a new process on the node of an engine to inspect the engine and kill it."""


@dataclass
class Engine:
    """The pool's record of an engine."""

    number: int
    node: int
    options: dict[str, Any]
    """Options of its Ray actor."""
    health: EngineHealth
    actor: ray.actor.ActorHandle = field(init=False)
    """Its Ray actor, another after every restart."""
    identity: Future | None = None
    """Node and process id of the actor."""
    hung: str | None = None
    """Reason why the actor was killed, where it made no progress."""
    starting: Future | None = None
    finished: Future | None = None
    """The call that waits for finished requests."""
    running: dict[int, Request] = field(default_factory=dict)
    """Unfinished requests by number."""

    @property
    def name(self) -> str:
        return f"engine {self.number}"

    @property
    def place_name(self) -> str:
        return "process {1} on {0}".format(*self.place) if self.place else "process unknown"

    @property
    def place(self) -> tuple[str, int] | None:
        """Node and process id; None as long as they are not known."""
        identity = self.identity
        return identity.result() if identity and identity.done() and not identity.exception() else None

    @property
    def load(self) -> int:
        """Responses in flight."""
        return sum(request.sampling.responses for request in self.running.values())

    def hangs(self, activity: Activity | None) -> bool:
        """Whether the engine, which does `activity` (None: does not answer), is the cause where nothing progresses. One
        that is starting may not answer yet."""
        if self.health.state is EngineState.STARTING:
            return False
        return activity is None or (activity.method is not None and activity.method not in MAY_WAIT)

    def kill_hung(self, what: str, why: str) -> None:
        """Kills an engine that makes no progress; the pool replaces it as any other that died, and gives as the reason
        `what` it does, and `why` it is killed. Any thread may call it."""
        options = {"num_cpus": 0, "scheduling_strategy": self.options["scheduling_strategy"]}
        self.hung = f"{what} ({self.place_name}): {why}"
        if self.place:
            process = self.place[1]
            states = _result(ray.remote(dump_stacks).options(**options).remote([process])) or {}
            self.hung = f"{what} ({self.place_name}, {states.get(process, 'state unknown')}): {why}"
            # Also its ranks, which do not end by themselves when they are stopped.
            _result(ray.remote(kill_tree).options(**options).remote(process))
        ray.kill(self.actor)


def _result(call: ray.ObjectRef) -> Any:
    """Result of a call on the engine's node; None if there is none in time."""
    done, _ = ray.wait([call], timeout=HUNG_SECONDS)
    try:
        return ray.get(done[0]) if done else None
    except ray.exceptions.RayError:
        return None  # Nothing can be started on the node.
