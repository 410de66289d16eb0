"""Simulated engine: the timing of a RolloutEngine, by a model of its decode steps instead of a model on a GPU."""

import heapq
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count

from meds_megatron.bench.simulation.clock import Clock, Event
from meds_megatron.bench.simulation.rates import EngineRates
from meds_megatron.bench.simulation.workload import Workload
from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.samples import Completion


@dataclass(eq=False)
class _Response:
    """A response that is generated; `order` is that of its arrival."""

    order: int
    request: Request
    index: int
    length: int
    """Tokens at which it ends."""
    generated: int = 0
    """Tokens up to the decode step `since`."""
    since: int | None = None
    """Decode step at which it began to run; None while it waits."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(policy version, first token that it drew)."""

    def tokens(self, step: int) -> int:
        """Generated tokens after `step` decode steps of the engine."""
        return self.generated + (0 if self.since is None else step - self.since)


@dataclass
class _Stretch:
    """Decode steps between which no response starts or ends."""

    begun: float
    prefill: float
    steps: int
    event: Event


class SimulatedEngine:
    """Continuous batching of at most `max_num_seqs` responses, as many as the KV cache holds.

    All responses that run draw one token in every decode step, so the engine goes from one event to the next: a
    response ends, the KV cache is full, a call arrives. A call takes effect when the decode step under way is done.
    Responses start in the order of their arrival, those that the full cache displaced (the newest) before others, whose
    cache is then recomputed. The prompt of a request is computed once for all its responses. A weight update empties
    the cache, and what runs is recomputed with the new weights. Prefill holds up the decode steps of the others.

    Methods are those of `RolloutEngine`, but return futures.
    """

    def __init__(
        self, clock: Clock, rates: EngineRates, workload: Workload, number: int, disk_version: int | None = None
    ) -> None:
        self._clock, self._rates, self._workload, self._number = clock, rates, workload, number
        self.busy_seconds = 0.0
        """Seconds of generation and weight updates."""
        self.alive = True
        self._version = disk_version
        self._next_version: int | None = None
        self._orders = count()
        self._waiting: deque[_Response] = deque()
        self._running: list[tuple[int, int, _Response]] = []
        """A heap of (decode step at which it ends, order, response)."""
        self._step = 0
        self._cached = 0
        """Tokens of the running responses and their prompts."""
        self._computed_prompts: set[int] = set()
        """Numbers of the requests whose prompts are in the cache."""
        self._to_compute = 0.0
        """Seconds of prefill before the next decode step."""
        self._stretch: _Stretch | None = None
        self._unfinished: dict[int, list[Completion | None]] = {}
        """Completions of each request, by its number."""
        self._finished: dict[int, list[Completion]] = {}
        self._taker: Future | None = None
        self._interruption: Future | None = None
        self._pending: list[Future] = []
        """All futures that the end of the process would fail."""

    # Calls of the pool and the weight sync.

    def start(self, restarts: int = 0) -> Future:
        return self._own(self._clock.done_after(self._rates.start_seconds, ("simulated", self._number)))

    def add(self, requests: Sequence[Request], seed: int | None = None) -> Future:
        if self._version is None:
            raise RuntimeError(f"engine {self._number} has stale weights: finish a weight update first")
        for request in requests:
            lengths = self._workload.lengths(request)
            self._unfinished[request.number] = [None] * len(lengths)
            self._waiting.extend(
                _Response(next(self._orders), request, index, length) for index, length in enumerate(lengths)
            )
        if self._stretch is None:
            self._go_on()
        elif self._may_start(self._waiting[0]):
            self._stop_after_step()
        return self._clock.done_after(0)

    def take_finished(self) -> Future:
        self._taker = self._own(Future())
        self._give_finished()
        return self._taker

    def begin_weight_update(self, version: int) -> Future:
        self._version, self._next_version = None, version
        self._interruption = self._own(Future())
        if self._stretch is None:
            self._interruption.set_result(None)
        else:
            self._stop_after_step()
        return self._interruption

    def load_bucket(self, seconds: float) -> Future:
        self.busy_seconds += seconds
        return self._own(self._clock.done_after(seconds))

    def finish_weight_update(self) -> Future:
        self._version, self._interruption = self._next_version, None
        self._computed_prompts.clear()
        for _, _, response in self._running:
            self._begin_version(response)
            self._compute(response)
        for response in self._waiting:
            if response.versions:
                self._begin_version(response)
        self._go_on()
        return self._clock.done_after(0)

    def sleep(self, keep_weights: bool) -> Future:
        if not keep_weights:
            self._version = None
        self._computed_prompts.clear()
        return self._clock.done_after(0)

    def wake(self, part: str) -> Future:
        return self._clock.done_after(0)

    def close(self) -> Future:
        return self._clock.done_after(0)

    def die(self, error: Exception) -> None:
        """The process ends: calls under way fail."""
        self.alive = False
        if self._stretch:
            self._stretch.event.cancel()
        for future in self._pending:
            if not future.done():
                future.set_exception(error)

    # Decode steps.

    def _go_on(self) -> None:
        """Starts responses and plans the decode steps up to the next event."""
        self._stretch = None
        if self._interruption is not None:
            if not self._interruption.done():
                self._interruption.set_result(None)
            return
        while self._waiting and self._may_start(self._waiting[0]):
            self._start_response(self._waiting.popleft())
        if not self._running:
            return
        sequences = len(self._running)
        while self._cached + sequences > self._rates.kv_tokens and sequences > 1:
            self._displace_newest()
            sequences -= 1
        steps = self._running[0][0] - self._step
        if sequences > 1:
            steps = min(steps, (self._rates.kv_tokens - self._cached) // sequences)
        prefill, self._to_compute = self._to_compute, 0.0
        event = self._clock.after(prefill + self._decode_seconds(steps), self._end_stretch)
        self._stretch = _Stretch(self._clock.now, prefill, steps, event)

    def _decode_seconds(self, steps: int) -> float:
        """Seconds of the next `steps` steps; every step caches a token more of each response."""
        sequences = len(self._running)
        mean_cached = self._cached + sequences * (steps - 1) / 2
        return steps * self._rates.decode_seconds(sequences, mean_cached)

    def _stop_after_step(self) -> None:
        """Shortens the stretch to the decode step under way, the first one at least."""
        stretch = self._stretch
        assert stretch is not None
        elapsed = self._clock.now - stretch.begun - stretch.prefill
        low, high = 1, stretch.steps
        while low < high:
            middle = (low + high) // 2
            if self._decode_seconds(middle) < elapsed:
                low = middle + 1
            else:
                high = middle
        stretch.event.cancel()
        stretch.steps = low
        stretch.event = self._clock.after(max(0.0, self._decode_seconds(low) - elapsed), self._end_stretch)

    def _end_stretch(self) -> None:
        stretch = self._stretch
        assert stretch is not None
        self.busy_seconds += self._clock.now - stretch.begun
        self._step += stretch.steps
        self._cached += stretch.steps * len(self._running)
        while self._running and self._running[0][0] == self._step:
            self._end_response(heapq.heappop(self._running)[2])
        self._go_on()
        self._give_finished()

    def _may_start(self, response: _Response) -> bool:
        tokens = len(response.request.prompt) + response.generated + 1
        fits = self._cached + len(self._running) + tokens <= self._rates.kv_tokens or not self._running
        return len(self._running) < self._rates.max_num_seqs and fits

    def _start_response(self, response: _Response) -> None:
        assert self._version is not None
        if not response.versions:
            response.versions.append((self._version, 0))
        response.since = self._step
        self._compute(response)
        self._cached += len(response.request.prompt) + response.generated
        ends = self._step + response.length - response.generated
        heapq.heappush(self._running, (ends, response.order, response))

    def _displace_newest(self) -> None:
        newest = max(self._running, key=lambda entry: entry[1])
        self._running.remove(newest)
        heapq.heapify(self._running)
        response = newest[2]
        response.generated, response.since = response.tokens(self._step), None
        self._cached -= len(response.request.prompt) + response.generated
        self._waiting.appendleft(response)

    def _compute(self, response: _Response) -> None:
        """Prefill of what is not in the cache."""
        prompt, generated = len(response.request.prompt), response.tokens(self._step)
        tokens = generated
        if response.request.number not in self._computed_prompts:
            self._computed_prompts.add(response.request.number)
            tokens += prompt
        self._to_compute += self._rates.prefill_seconds(tokens, prompt + generated)

    def _begin_version(self, response: _Response) -> None:
        assert self._version is not None
        if (generated := response.tokens(self._step)) == 0:
            response.versions.clear()
        response.versions.append((self._version, generated))

    def _end_response(self, response: _Response) -> None:
        request = response.request
        self._cached -= len(request.prompt) + response.length
        completions = self._unfinished[request.number]
        completions[response.index] = self._workload.completion(request, response.index, response.versions)
        finished = [completion for completion in completions if completion is not None]
        if len(finished) == len(completions):
            self._finished[request.number] = finished
            del self._unfinished[request.number]
            self._computed_prompts.discard(request.number)

    def _give_finished(self) -> None:
        if self._finished and self._taker and not self._taker.done():
            finished, self._finished = self._finished, {}
            self._taker.set_result(finished)

    def _own(self, future: Future) -> Future:
        self._pending = [pending for pending in self._pending if not pending.done()]
        self._pending.append(future)
        return future
