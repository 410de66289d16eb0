"""The pool's record of an engine, and the end of one that makes no progress."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray

from meds_megatron.launch.processes import kill_tree
from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.health import EngineHealth
from meds_megatron.supervised import request_stacks

HUNG_SECONDS = 30
"""For a new process on the node of an engine, to look at that and kill it."""


@dataclass
class Engine:
    """The pool's record of an engine."""

    number: int
    node: int
    options: dict[str, Any]
    """Of its Ray actor."""
    health: EngineHealth
    actor: ray.actor.ActorHandle = field(init=False)
    """Another after every restart."""
    identity: Future | None = None
    """Node and process id of the actor."""
    hung: str | None = None
    """Why the actor was killed, where it made no progress."""
    starting: Future | None = None
    finished: Future | None = None
    """The call that waits for finished requests."""
    running: dict[int, Request] = field(default_factory=dict)
    """By request number."""

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


def kill_hung(engine: Engine, what: str, why: str) -> None:
    """Kills an engine that makes no progress; the pool replaces it as any other that died, and gives as the reason
    `what` it does, and `why` it is killed. Any thread may call it."""
    options = {"num_cpus": 0, "scheduling_strategy": engine.options["scheduling_strategy"]}
    engine.hung = f"{what} ({engine.place_name}): {why}"
    if engine.place:
        process = engine.place[1]
        states = _result(ray.remote(request_stacks).options(**options).remote([process])) or {}
        engine.hung = f"{what} ({engine.place_name}, {states.get(process, 'state unknown')}): {why}"
        # Also its ranks, which do not end by themselves when they are stopped.
        _result(ray.remote(kill_tree).options(**options).remote(process))
    ray.kill(engine.actor)


def _result(call: ray.ObjectRef) -> Any:
    """Result of a call on the engine's node; None if there is none in time."""
    done, _ = ray.wait([call], timeout=HUNG_SECONDS)
    try:
        return ray.get(done[0]) if done else None
    except ray.exceptions.RayError:
        return None  # Nothing can be started on the node.
