"""Engines that share GPUs with the trainer: when they sleep, and when a restarted one starts. Calls are scripted."""

import pytest

from meds_megatron.config import Config
from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.health import EngineState
from meds_megatron.rollout.settings import Sampling
from tests.doubles import ScriptedEnginePool


def started(disk_version: int | None = None, nodes: int | None = None, **failing: int) -> ScriptedEnginePool:
    """Two engines that have weights; `failing` names methods and the engine that fails at their first call. The calls
    of the start are left out."""
    config = Config()
    config.rollout.engines, config.rollout.nodes = 2, nodes
    failures = {(engine, method): 1 for method, engine in failing.items()}
    pool = ScriptedEnginePool(config, disk_version=disk_version, failing=failures)
    pool.start()
    for engine in pool.engines:
        engine.health.updated()
    pool.calls.clear()
    return pool


def with_a_failed_engine(disk_version: int | None = None) -> ScriptedEnginePool:
    """Engine 0 has failed in a call and is restarted."""
    pool = started(disk_version, random_states=0)
    pool.outcomes(pool.call([0], "random_states"))
    return pool


@pytest.fixture
def pool() -> ScriptedEnginePool:
    return started()


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
    assert pool.calls == [("sleep", True, 0), ("sleep", True, 1)]
    pool.wake("weights")
    pool.wake("kv_cache")
    pool.release()
    added = Request(number=0, prompt=[1, 2], sampling=Sampling(1, 1), batch=0, seed=0)
    assert pool.calls[-2:] == [("add", [added], 0, 0), ("take_finished", 0)], "it is given out once they are awake"


def test_engines_with_unfinished_requests_do_not_sleep(pool):
    pool.engines[1].running = {0: Request(0, [1, 2], Sampling(1, 1))}
    with pytest.raises(RuntimeError, match="engines with unfinished requests cannot sleep"):
        pool.sleep(keep_weights=True)
    assert pool.calls == []


def test_an_engine_that_fails_while_others_sleep_starts_when_they_wake():
    pool = started(wake=1)
    pool.sleep(keep_weights=True)
    pool.wake("weights")
    assert pool.engines[1].health.state is EngineState.STARTING
    assert pool.calls[2:] == [("wake", "weights", 0), ("wake", "weights", 1)]
    pool.wake("kv_cache")
    assert pool.calls[4:] == [("wake", "kv_cache", 0), ("start", 1, 1)]


def test_a_starting_engine_is_waited_for_and_sleeps_too():
    pool = with_a_failed_engine()
    assert pool.calls == [("random_states", 0), ("start", 1, 0)]
    pool.sleep(keep_weights=True)
    assert pool.calls[2:] == [("sleep", True, 0), ("sleep", True, 1)]


@pytest.mark.parametrize(("disk_version", "state"), [(None, EngineState.STALE), (0, EngineState.FRESH)])
def test_a_restarted_engine_waits_for_the_weight_sync_unless_it_reads_weights_from_disk(disk_version, state):
    pool = with_a_failed_engine(disk_version)
    assert pool.engines[0].health.state is EngineState.STARTING
    assert pool.ready() == [0, 1]
    assert pool.engines[0].health.state is state
    assert pool.stale() == ([0] if state is EngineState.STALE else [])


def test_engines_on_nodes_of_their_own_never_sleep():
    pool = started(nodes=1)
    pool.sleep(keep_weights=True)
    pool.wake("weights")
    pool.wake("kv_cache")
    assert pool.calls == []
