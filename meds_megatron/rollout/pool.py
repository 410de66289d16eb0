"""All engines of a run: their requests, health, restarts and sleep."""

import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any, Literal

import numpy as np
import ray

from meds_megatron.cluster.placement import Placement, engine_places
from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.faults.supervised import (
    CONCURRENCY_GROUPS,
    SUPERVISION,
    failed_process,
    failure_reason,
    process_exists,
)
from meds_megatron.logs import last_log_line
from meds_megatron.rollout.engine import Request, RolloutEngine, engine_log
from meds_megatron.rollout.engine_record import Engine
from meds_megatron.rollout.health import EngineHealth, EngineState
from meds_megatron.rollout.samples import Completion
from meds_megatron.rollout.settings import Sampling, engine_env_vars

CLOSE_SECONDS = 10
IN_FLIGHT = 3.0
"""Responses of an engine in flight, as a multiple of `rollout.max_num_seqs`: enough that no engine waits for the driver
(with 1.5, `meds bench rollout` gave 0.84 of plain vLLM's speed at 64 sequences), and the rest stays with the pool for
whichever engine is free."""
WAITING = "finished"
"""Concurrency group of the calls that wait for finished requests."""

logger = logging.getLogger(__name__)


class EnginePool:
    """Starts an actor for every engine and gives queued requests to the engines.

    A request goes to the FRESH engine with the fewest responses in flight. Requests that were submitted with a seed go
    to the FRESH engines in turn instead, start together and are finished before others start, so that their completions
    depend on nothing but the seed.

    An engine whose process ends, or that raises, is restarted, and its unfinished requests go back to the head of the
    queue. With `disk_version` all engines, restarted ones too, read the weights in `model_dir`, whose version that is.
    Otherwise they stay STALE until a weight sync supplies weights.

    The constructor returns at once, so that engines and trainer ranks can start together; `start` waits.
    """

    def __init__(
        self,
        config: Config,
        model_dir: str,
        use_gpu: bool,
        placement: Placement,
        disk_version: int | None = None,
        alarm: Future | None = None,
        evaluation: bool = False,
    ) -> None:
        """Blocking calls raise the exception set on `alarm`. `evaluation` as in `RolloutEngine`."""
        self.restarts = self.regenerated_prompts = 0
        """Counts since the last call of `metrics`."""
        self.finished_requests = 0
        self._run_dir, self._alarm = config.run_dir, alarm or Future()
        self._disk_version, self._evaluation = disk_version, evaluation
        self._actor_class = ray.remote(concurrency_groups={WAITING: 1} | CONCURRENCY_GROUPS)(RolloutEngine)
        self._arguments = (config, model_dir, use_gpu)
        # An update that waits for what an engine has should not wait for more than it generates at once.
        finishes = config.train.max_staleness > 0 and config.rollout.on_update == "finish"
        self._most_in_flight = (1.0 if finishes else IN_FLIGHT) * config.rollout.max_num_seqs
        # vLLM can sleep on GPUs only; there is no need where engines have nodes of their own.
        self._sleeps = use_gpu and config.rollout.nodes is None and not evaluation
        self.asleep = False
        """Whether the engines have left their GPUs' memory to the trainer."""
        self._holds = False
        """Whether queued requests stay in the queue."""
        self._queue: deque[Request] = deque()
        self._numbers, self._batches = count(), count()
        env_vars = engine_env_vars(config, use_gpu)
        self.engines = [
            Engine(
                number,
                place.node,
                placement.options(place, env_vars),
                EngineHealth(number, config.rollout.max_failures),
            )
            for number, place in enumerate(engine_places(config.cluster, config.rollout))
        ]
        for engine in self.engines:
            engine.actor = self._make_actor(engine)
            self._start(engine)

    def start(self) -> None:
        """Returns when all engines have loaded the model. Raises UserError when the machine cannot run it."""
        self._wait_until_started()

    # Requests.

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        seed: int | None = None,
        first: bool = False,
    ) -> list[int]:
        """Queues prompts (token ids), each with its sampling or all with one; returns their request numbers.

        With a seed the completions are repeatable: give every call of a step another. `first` puts them before those
        that wait in the pool.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        batch = next(self._batches)
        requests = [
            Request(next(self._numbers), prompt, own, batch, seed)
            for prompt, own in zip(prompts, samplings, strict=True)
        ]
        if first:
            self._queue.extendleft(reversed(requests))
        else:
            self._queue += requests
        self._dispatch()
        return [request.number for request in requests]

    def wait(self, *others: Future) -> dict[int, list[Completion]]:
        """Waits until a request is finished, an engine has started or failed, or one of `others` is done.

        Returns the completions of all requests finished since the last call, by request number. Raises RuntimeError
        when nothing can happen: no engine is FRESH, or all are asleep.
        """
        self._dispatch()
        events = [event for engine in self.engines for event in (engine.starting, engine.finished) if event]
        if not events and not others:
            raise RuntimeError("no engine can generate: wake the engines and run the weight sync first")
        self._wait_for_any(*events, *others)
        self._take_started()
        completions = {number: made for engine in self.engines for number, made in self._take_finished(engine).items()}
        self._dispatch()
        return completions

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling], seed: int | None = None
    ) -> list[list[Completion]]:
        """Completions of each prompt, in order. For a pool that has no other requests."""
        numbers = self.submit(prompts, sampling, seed)
        completions: dict[int, list[Completion]] = {}
        while len(completions) < len(numbers):
            completions |= self.wait()
        return [completions[number] for number in numbers]

    @property
    def running(self) -> bool:
        """Whether an engine has unfinished requests."""
        return any(engine.running for engine in self.engines)

    def hold(self) -> None:
        """Gives the engines no more requests until `release`; they finish those that they have."""
        self._holds = True

    def release(self) -> None:
        """Gives the engines requests again."""
        self._holds = False
        self._dispatch()

    # Calls of the weight sync.

    def ready(self) -> list[int]:
        """Engines that have loaded the model: they can be given weights."""
        self._take_started()
        return [engine.number for engine in self.engines if engine.health.state is not EngineState.STARTING]

    def stale(self) -> list[int]:
        """Engines that have loaded the model but lack the current weights."""
        return [number for number in self.ready() if self.engines[number].health.state is EngineState.STALE]

    def call(self, engines: Iterable[int], method: str, *arguments: Any) -> dict[int, ray.ObjectRef]:
        """Calls a method of several engines; `outcomes` returns the results."""
        return {engine: getattr(self.engines[engine].actor, method).remote(*arguments) for engine in engines}

    def outcomes(self, calls: dict[int, ray.ObjectRef]) -> dict[int, Any]:
        """Results of `call` by engine. Engines that failed are left out and restarted. Raises UserError as is."""
        results = {}
        for engine, reference in calls.items():
            try:
                results[engine] = self._get(reference)
            except UserError:
                raise
            except ray.exceptions.RayError as error:
                self._restart(self.engines[engine], error)
        return results

    # Memory of GPUs that engines and trainer ranks share. Elsewhere engines do not sleep.

    def sleep(self, keep_weights: bool) -> None:
        """Frees the engines' GPU memory. A starting engine is waited for: it would take the memory that others need.

        `keep_weights` copies the weights to the host's memory, for engines that generate with them again; without it
        the engines are STALE until a weight sync.
        """
        if not self._sleeps or self.asleep:
            return
        if self.running:
            raise RuntimeError("engines with unfinished requests cannot sleep: wait for the requests first")
        self._wait_until_started()
        self.asleep = True
        for engine in self.outcomes(self.call(self.ready(), "sleep", keep_weights)):
            if not keep_weights:
                self.engines[engine].health.weights_dropped()

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Takes the GPU memory back: for the weights before an update, for the KV cache after it.

        An engine that failed meanwhile is started after the KV caches.
        """
        if not self.asleep:
            return
        self.outcomes(self.call(self.ready(), "wake", part))
        if part == "kv_cache":
            self.asleep = False
            for engine in self.engines:
                if engine.health.state is EngineState.STARTING and not engine.starting:
                    self._start(engine)

    # Checkpoints.

    def random_states(self) -> dict[str, np.ndarray]:
        """States of the engines' generators, bytes by `engine0.rank0.cpu` and the like. Engines that are starting have
        none."""
        found = self.outcomes(self.call(self.ready(), "random_states"))
        return {f"engine{engine}.{name}": state for engine, states in found.items() for name, state in states.items()}

    def set_random_states(self, states: dict[str, np.ndarray], salt: int) -> bool:
        """Continues from `random_states`. Engines that it has no states for, or those of other devices, get new seeds,
        others for each `salt`; returns whether there are none."""
        by_engine: dict[int, dict[str, np.ndarray]] = {engine.number: {} for engine in self.engines}
        for name, state in states.items():
            saved_engine, _, rest = name.partition(".")
            by_engine.get(int(saved_engine.removeprefix("engine")), {})[rest] = state
        calls: dict[int, ray.ObjectRef] = {}
        for engine in self.ready():
            calls |= self.call([engine], "set_random_states", by_engine[engine], salt)
        return all(self.outcomes(calls).values()) and len(calls) == len(self.engines)

    def metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        counts: dict[str, float] = {
            "rollout/engine_restarts": self.restarts,
            "rollout/regenerated_prompts": self.regenerated_prompts,
        }
        self.restarts = self.regenerated_prompts = 0
        return counts

    def close(self) -> None:
        """Ends the engines and returns when they are gone; one that has not ended after CLOSE_SECONDS is killed."""
        self._end_actors(self.engines)
        deadline = time.monotonic() + CLOSE_SECONDS
        while time.monotonic() < deadline and any(
            engine.place and process_exists(engine.place) for engine in self.engines
        ):
            time.sleep(0.05)

    def _dispatch(self) -> None:
        fresh = [engine for engine in self.engines if engine.health.state is EngineState.FRESH]
        if self.asleep or self._holds or not fresh or not self._queue:
            return
        if self._alarm.done():
            self._alarm.result()
        shares: dict[int, list[Request]] = {engine.number: [] for engine in fresh}
        running = [request for engine in self.engines for request in engine.running.values()]
        batch, seed = self._queue[0].batch, self._queue[0].seed
        if any(request.seed is not None for request in running) or (seed is not None and running):
            return
        if seed is not None:
            for place in range(sum(request.batch == batch for request in self._queue)):
                shares[fresh[place % len(fresh)].number].append(self._queue.popleft())
        else:
            loads = {engine.number: engine.load for engine in fresh}
            while self._queue and self._queue[0].seed is None and min(loads.values()) < self._most_in_flight:
                least = min(loads, key=loads.__getitem__)
                shares[least].append(request := self._queue.popleft())
                loads[least] += request.sampling.responses
        for engine in fresh:
            if share := shares[engine.number]:
                engine.running |= {request.number: request for request in share}
                # What `add` raises is raised by `take_finished` too.
                engine.actor.add.remote(share, seed)
                self._watch(engine)

    def _watch(self, engine: Engine) -> None:
        if engine.running and not engine.finished:
            engine.finished = engine.actor.take_finished.options(concurrency_group=WAITING).remote().future()

    def _take_finished(self, engine: Engine) -> dict[int, list[Completion]]:
        if not engine.finished or not engine.finished.done():
            return {}
        event, engine.finished = engine.finished, None
        completions = self._result(engine, event) or {}
        for number in completions:
            del engine.running[number]
            self.finished_requests += 1
            engine.health.generated()
        self._watch(engine)
        return completions

    def _take_started(self) -> None:
        for engine in self.engines:
            if engine.starting and engine.starting.done():
                event, engine.starting = engine.starting, None
                actor = engine.actor
                self._result(engine, event)
                if engine.actor is actor:
                    engine.health.started()
                    if self._disk_version is not None:
                        engine.health.updated()

    def _wait_until_started(self) -> None:
        while events := [engine.starting for engine in self.engines if engine.starting]:
            self._wait_for_any(*events)
            self._take_started()

    def _get(self, reference: ray.ObjectRef) -> Any:
        self._wait_for_any(event := reference.future())
        return event.result()

    def _result(self, engine: Engine, event: Future) -> Any:
        """Result of a call of the engine's current actor; None if it failed: the engine is then being restarted."""
        try:
            return event.result()
        except UserError:
            raise
        except ray.exceptions.RayError as error:
            self._restart(engine, error)

    def _restart(self, engine: Engine, error: Exception) -> None:
        reason = engine.hung or f"{failure_reason(error)} ({failed_process(error)})"
        engine.hung = None
        if isinstance(error, ray.exceptions.RayActorError) and (
            words := last_log_line(self._run_dir, engine_log(engine.number))
        ):
            reason += f"; the end of its log: {words}"
        self._end_actors([engine])
        engine.health.failed(reason)
        logger.warning("engine %d on node %d failed and is restarted: %s", engine.number, engine.node, reason)
        logger.info("all that engine %d raised:\n%s", engine.number, error)
        self.restarts += 1
        self.regenerated_prompts += len(engine.running)
        self._queue.extendleft(reversed(engine.running.values()))
        engine.running, engine.starting, engine.finished = {}, None, None
        engine.actor = self._make_actor(engine)
        # While the others sleep there is no memory for it: `wake` starts it.
        if not self.asleep:
            self._start(engine)

    def _start(self, engine: Engine) -> None:
        engine.starting = engine.actor.start.remote(engine.health.restarts).future()

    # All that depends on where engines run: pools whose engines are no Ray actors override these three.

    def _make_actor(self, engine: Engine) -> ray.actor.ActorHandle:
        """A new actor for the engine; called by the constructor, too."""
        actor_class = self._actor_class.options(**engine.options)
        actor = actor_class.remote(*self._arguments, engine.number, self._disk_version, self._evaluation)
        engine.identity = actor.process.options(concurrency_group=SUPERVISION).remote().future()
        return actor

    def _end_actors(self, engines: Sequence[Engine]) -> None:
        """Ends the engines' actors, which may be dead."""
        # An actor that still runs frees what it shares with its ranks.
        calls = [engine.actor.close.remote() for engine in engines]
        ray.wait(calls, num_returns=len(calls), timeout=CLOSE_SECONDS)
        for engine in engines:
            ray.kill(engine.actor)

    def _wait_for_any(self, *events: Future) -> None:
        """Returns when one of `events` is done. Raises the exception set on the alarm."""
        concurrent.futures.wait([*events, self._alarm], return_when=concurrent.futures.FIRST_COMPLETED)
        if self._alarm.done():
            self._alarm.result()
