"""Engines that share GPUs with the trainer: when they sleep, and when a restarted one starts. Calls are scripted."""

from collections import deque
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from meds_megatron.rollout import pool as pool_module
from meds_megatron.rollout.health import EngineHealth, EngineState
from meds_megatron.rollout.pool import Engine, EnginePool
from meds_megatron.rollout.settings import Sampling


class ScriptedPool(EnginePool):
    """Two engines that have started; `calls` holds the calls they got, in order."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.restarts = self.regenerated_prompts = 0
        self._disk_version, self._queue, self._alarm = None, deque(), Future()
        self._run_dir = ""
        self._numbers = self._batches = iter(range(100))
        self._sleeps, self.asleep = True, False
        self.engines = [Engine(e, 0, {}, EngineHealth(e, 3, EngineState.FRESH)) for e in range(2)]
        for engine in self.engines:
            self._make(engine)

    def _make(self, engine):
        engine.actor = SimpleNamespace(close=SimpleNamespace(remote=lambda: None))

    def _start(self, engine):
        self.calls.append(("start", engine.number))
        engine.starting = Future()
        engine.starting.set_result(None)

    def call(self, engines, method, *arguments):
        self.calls += [(method, *arguments, engine) for engine in engines]
        return dict.fromkeys(engines)

    def _get(self, reference):
        return reference


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pool_module.ray, "wait", lambda *_, **__: None)
    monkeypatch.setattr(pool_module.ray, "kill", lambda actor: None)
    return ScriptedPool()


def test_weights_wake_before_the_kv_cache_and_only_once(pool):
    pool.sleep(keep_weights=True)
    pool.sleep(keep_weights=True)
    pool.wake("weights")
    pool.wake("kv_cache")
    pool.wake("weights")
    pool.wake("kv_cache")
    assert pool.calls == [
        *[("sleep", True, 0), ("sleep", True, 1)],
        *[("wake", "weights", 0), ("wake", "weights", 1)],
        *[("wake", "kv_cache", 0), ("wake", "kv_cache", 1)],
    ]


def test_engines_that_drop_their_weights_generate_again_after_a_weight_sync_only(pool):
    pool.sleep(keep_weights=False)
    assert pool.calls == [("sleep", False, 0), ("sleep", False, 1)]
    pool.wake("weights")
    assert pool.stale() == [0, 1]
    pool.engines[1].health.updated()
    pool.wake("kv_cache")
    assert pool.stale() == [0]
    assert [engine.health.state for engine in pool.engines] == [EngineState.STALE, EngineState.FRESH]


def test_engines_that_keep_their_weights_stay_fresh(pool):
    pool.sleep(keep_weights=True)
    # Already asleep: the weights are in the host's memory.
    pool.sleep(keep_weights=False)
    assert pool.stale() == []


def test_sleeping_engines_get_no_requests(pool):
    pool.sleep(keep_weights=True)
    pool.submit([[1, 2]], Sampling(1, 1), seed=0)
    with pytest.raises(RuntimeError, match="no engine can generate: wake the engines"):
        pool.wait()
    assert len(pool._queue) == 1


def test_engines_with_unfinished_requests_do_not_sleep(pool):
    pool.engines[1].running = {0: None}
    with pytest.raises(RuntimeError, match="engines with unfinished requests cannot sleep"):
        pool.sleep(keep_weights=True)
    assert pool.calls == []


def test_an_engine_that_fails_while_others_sleep_starts_when_they_wake(pool):
    pool.sleep(keep_weights=True)
    pool._restart(pool.engines[1], RuntimeError("out of memory"))
    pool.wake("weights")
    assert ("start", 1) not in pool.calls
    pool.wake("kv_cache")
    assert pool.calls[-1] == ("start", 1)


def test_a_starting_engine_is_waited_for_and_sleeps_too(pool):
    pool._restart(pool.engines[0], RuntimeError("killed"))
    assert pool.calls == [("start", 0)]
    pool.sleep(keep_weights=True)
    assert pool.calls[1:] == [("sleep", True, 0), ("sleep", True, 1)]


def test_a_restarted_engine_waits_for_the_weight_sync_unless_it_reads_weights_from_disk(pool):
    for disk_version, state in ((None, EngineState.STALE), (0, EngineState.FRESH)):
        pool._disk_version = disk_version
        pool._restart(pool.engines[0], RuntimeError("killed"))
        assert pool.engines[0].health.state is EngineState.STARTING
        assert pool.ready() == [0, 1]
        assert pool.engines[0].health.state is state
        assert pool.stale() == ([0] if state is EngineState.STALE else [])


def test_engines_on_nodes_of_their_own_never_sleep(pool):
    pool._sleeps = False
    pool.sleep(keep_weights=True)
    pool.wake("weights")
    pool.wake("kv_cache")
    assert pool.calls == []
