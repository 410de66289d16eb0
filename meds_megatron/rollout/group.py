"""All engines of a run as the driver sees them: one object that generates, takes new weights and replaces engines that
die."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import ray

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.launch.placement import Placement, engine_places
from meds_megatron.rollout.engine import RolloutEngine
from meds_megatron.rollout.environment import engine_environment
from meds_megatron.rollout.fleet import Fleet, Health
from meds_megatron.rollout.response import Response
from meds_megatron.rollout.sampling import Sampling

CLOSE_SECONDS = 10
LONGEST_REASON = 300
FAILED = object()
"""Stands for the result of a call whose engine failed."""

Refill = Callable[[list[int]], None]
"""Gives the engines the policy's weights; they are fresh afterwards, or have failed."""


@dataclass(frozen=True)
class Part:
    """The prompts that one engine is at work on."""

    engine: int
    actor: ray.actor.ActorHandle
    indices: list[int]
    reference: ray.ObjectRef


class PendingResponses:
    """Responses that engines are at work on; `result` waits for them."""

    def __init__(self, group: "EngineGroup", prompts: Sequence[list[int]], sampling: Sampling, seed: int):
        self._group, self._prompts, self._sampling, self._seed = group, prompts, sampling, seed
        self._parts = self._assign(range(len(prompts)))

    def result(self) -> list[Response]:
        """All responses, in the order of the prompts and, of one prompt, in the order they were drawn.

        What an engine that died had not finished is generated again, by the engines that are left.
        """
        responses: list[Response] = []
        while self._parts:
            unfinished: list[int] = []
            for part in self._parts:
                made = self._group.outcome(part.engine, part.actor, part.reference)
                if made is FAILED:
                    unfinished += part.indices
                else:
                    self._group.fleet.generated(part.engine)
                    responses += made
            self._group.regenerated_prompts += len(unfinished)
            self._parts = self._assign(sorted(unfinished)) if unfinished else []
        return sorted(responses, key=lambda response: response.prompt_index)

    def _assign(self, indices: Sequence[int]) -> list[Part]:
        """The prompts shared out evenly over the engines that have fresh weights."""
        engines, parts = self._group.usable(), []
        for place, engine in enumerate(engines):
            share = list(indices[place :: len(engines)])
            if share:
                actor = self._group.engines[engine]
                prompts = [self._prompts[index] for index in share]
                reference = actor.generate.remote(prompts, share, self._sampling, self._seed)
                parts.append(Part(engine, actor, share, reference))
        return parts


class EngineGroup:
    """Starts a Ray actor an engine and speaks to them together.

    The constructor returns at once, so that engines and trainer ranks can start side by side; `start` waits. An engine
    whose process dies, or that fails in a call, is started anew: it is left out until it has fresh weights.
    """

    def __init__(self, config: Config, model_dir: str, use_gpu: bool, placement: Placement, read_weights: bool = True):
        """With `read_weights` the engines read the model's weights from disk; otherwise `refill` has to give them some
        before they can generate."""
        self._config = config
        self._arguments = (config, model_dir, use_gpu)
        self._read_weights = read_weights
        self._actor = ray.remote(RolloutEngine)
        environment = engine_environment(config, use_gpu)
        self._options = [
            placement.options(place, environment) for place in engine_places(config.cluster, config.rollout)
        ]
        self.fleet = Fleet(len(self._options), config.rollout.max_failures)
        self.engines = [self._make(engine) for engine in range(len(self._options))]
        self._starting = {engine: actor.start.remote() for engine, actor in enumerate(self.engines)}
        # Only where trainer ranks need the memory: vLLM can sleep on GPUs alone.
        self._sleeps = use_gpu and config.rollout.nodes is None
        self._asleep = False
        self.refill: Refill | None = None
        """How engines that were started anew get their weights."""
        self.on_failure: Callable[[str], None] = lambda text: None
        """Hears a sentence about every engine that failed."""
        self.before_waking: Callable[[], None] = lambda: None
        """Makes room on the GPUs that engines are about to take back."""
        self.regenerated_prompts = 0
        """Since the run began."""

    def start(self, disk_weights_version: int | None = None) -> None:
        """Returns when all engines have loaded the model.

        With a version, the weights that they read from disk are declared to be that version; without, the engines wait
        for their first weight update. Raises UserError when the machine cannot run the model.
        """
        ray.get(list(self._starting.values()))
        for engine in self._starting:
            self.fleet.started(engine)
        self._starting = {}
        if disk_weights_version is not None:
            self.refill = partial(self._trust_disk, disk_weights_version)
            self.refill(self.ready())

    def submit(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> PendingResponses:
        """Sets the engines to work on `prompts` (token ids), shared out evenly, and returns at once.

        `seed` makes the responses repeatable: give every call of a step its own.
        """
        return PendingResponses(self, prompts, sampling, seed)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Response]:
        """Responses to `prompts`, `sampling.responses` of each, in their order."""
        return self.submit(prompts, sampling, seed).result()

    def ready(self) -> list[int]:
        """The engines that have started: they can take weights."""
        self._notice_started(timeout=0)
        return self.fleet.having(Health.STALE, Health.FRESH)

    def usable(self) -> list[int]:
        """The engines that can generate, awake. Engines that were started anew are given weights first; where no engine
        is left, this waits for one.

        Raises RuntimeError when no engine has weights and there is no way to give them some.
        """
        self.wake()
        while True:
            self.ready()
            stale = self.fleet.having(Health.STALE)
            if stale and self.refill:
                self.refill(stale)
            fresh = self.fleet.having(Health.FRESH)
            if fresh:
                return fresh
            if not self._starting:
                raise RuntimeError("all engines have stale weights: update them, or trust the ones on disk, first")
            self._notice_started(timeout=None)

    def call(self, engines: Iterable[int], method: str, *arguments) -> dict[int, ray.ObjectRef]:
        """Calls a method of several engines; `outcomes` gives what it returns."""
        return {engine: getattr(self.engines[engine], method).remote(*arguments) for engine in engines}

    def outcomes(self, calls: dict[int, ray.ObjectRef]) -> dict[int, object]:
        """Results of `call` by engine, without the engines that failed: those are starting anew."""
        return {
            engine: value
            for engine, reference in calls.items()
            if (value := self.outcome(engine, self.engines[engine], reference)) is not FAILED
        }

    def outcome(self, engine: int, actor: ray.actor.ActorHandle, reference: ray.ObjectRef):
        """What a call of `actor` returned, FAILED when it failed. Raises UserError for a mistake of the user's."""
        try:
            return ray.get(reference)
        except UserError:
            raise
        except ray.exceptions.RayError as error:
            self._replace(engine, actor, error)
            return FAILED

    def sleep(self) -> None:
        """Leaves the GPUs to the trainer, where both share them.

        An engine that is still starting is waited for: it would take the memory that the trainer needs.
        """
        if self._sleeps and not self._asleep:
            while self._starting:
                self._notice_started(timeout=None)
            self._asleep = True
            self.outcomes(self.call(self.ready(), "sleep"))

    def wake(self, *parts: str) -> None:
        """Takes the memory back: "weights" for an update, then the "kv_cache"; both without an argument."""
        if not self._asleep:
            return
        self.before_waking()
        for part in parts or ("weights", "kv_cache"):
            self.outcomes(self.call(self.ready(), "wake", part))
        if "kv_cache" in (parts or ("kv_cache",)):
            self._asleep = False
            for engine in self.fleet.having(Health.STARTING):
                self._start(engine)

    def metrics(self) -> dict[str, float]:
        return {
            "rollout/engine_restarts": self.fleet.restarts,
            "rollout/regenerated_prompts": self.regenerated_prompts,
        }

    def close(self) -> None:
        """Ends the engines; one that is still at work after CLOSE_SECONDS is killed."""
        ray.wait([e.close.remote() for e in self.engines], num_returns=len(self.engines), timeout=CLOSE_SECONDS)
        for engine in self.engines:
            ray.kill(engine)

    def _trust_disk(self, version: int, engines: list[int]) -> None:
        for engine in self.outcomes(self.call(engines, "trust_disk_weights", version)):
            self.fleet.filled(engine)

    def _make(self, engine: int) -> ray.actor.ActorHandle:
        return self._actor.options(**self._options[engine]).remote(*self._arguments, engine, self._read_weights)

    def _replace(self, engine: int, actor: ray.actor.ActorHandle, error: Exception) -> None:
        """Starts an engine anew, unless that has been done since `actor` failed."""
        if self.engines[engine] is not actor:
            return
        reason = _last_line(error)
        # One that still lives gives back what it shares with its ranks.
        ray.wait([actor.close.remote()], timeout=CLOSE_SECONDS)
        ray.kill(actor)
        self.fleet.failed(engine, reason)
        self.on_failure(f"engine {engine} failed and is started anew: {reason}")
        self.engines[engine] = self._make(engine)
        # While the others sleep there is no memory for it: it starts when they wake.
        if not self._asleep:
            self._start(engine)

    def _start(self, engine: int) -> None:
        if engine not in self._starting:
            self._starting[engine] = self.engines[engine].start.remote()

    def _notice_started(self, timeout: float | None) -> None:
        """Takes note of engines that have started; with no timeout, waits for at least one."""
        if not self._starting:
            return
        wanted = 1 if timeout is None else len(self._starting)
        done, _ = ray.wait(list(self._starting.values()), num_returns=wanted, timeout=timeout)
        for engine, reference in list(self._starting.items()):
            if reference in done:
                del self._starting[engine]
                try:
                    ray.get(reference)
                    self.fleet.started(engine)
                except ray.exceptions.RayError as error:
                    self._replace(engine, self.engines[engine], error)


def _last_line(error: Exception) -> str:
    """What an actor said last, without Ray's account of where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:LONGEST_REASON] if lines else type(error).__name__
