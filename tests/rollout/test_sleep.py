"""Engines that share GPUs with the trainer: who sleeps when, and when a new one may start. Calls are scripted."""

from types import SimpleNamespace

import pytest
from meds_megatron.rollout.fleet import Fleet
from meds_megatron.rollout.group import EngineGroup

from meds_megatron.rollout import group as group_module


class ScriptedGroup(EngineGroup):
    """Two engines that have started; `said` holds what they were told, in order."""

    def __init__(self):
        self.said: list[tuple] = []
        self.fleet = Fleet(2, max_failures=3)
        self.engines = [self._make(0), self._make(1)]
        self._starting, self._sleeps, self._asleep = {}, True, False
        self.refill, self.on_failure = None, lambda text: None
        self.before_waking = lambda: self.said.append(("room",))
        for engine in range(2):
            self.fleet.started(engine)
            self.fleet.filled(engine)

    def _make(self, engine):
        close = SimpleNamespace(remote=lambda: None)
        return SimpleNamespace(start=SimpleNamespace(remote=lambda: self.said.append(("start", engine))), close=close)

    def call(self, engines, method, *arguments):
        self.said += [(method, *arguments, engine) for engine in engines]
        return {}

    def outcomes(self, calls):
        return {}

    def _notice_started(self, timeout):
        for engine in self._starting:
            self.fleet.started(engine)
        self._starting = {}


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(group_module, "ray", SimpleNamespace(wait=lambda *_, **__: None, kill=lambda actor: None))
    return ScriptedGroup()


def test_weights_wake_before_the_cache_and_room_is_made_first(group):
    group.sleep()
    group.sleep()
    group.wake("weights")
    group.wake("kv_cache")
    group.wake()
    assert group.said == [
        *[("sleep", 0), ("sleep", 1)],
        *[("room",), ("wake", "weights", 0), ("wake", "weights", 1)],
        *[("room",), ("wake", "kv_cache", 0), ("wake", "kv_cache", 1)],
    ]


def test_generation_wakes_everything(group):
    group.sleep()
    group.usable()
    assert group.said[2:] == [("room",), *[("wake", part, e) for part in ("weights", "kv_cache") for e in range(2)]]


def test_an_engine_that_fails_while_others_sleep_starts_when_they_wake(group):
    group.sleep()
    group._replace(1, group.engines[1], RuntimeError("out of memory"))
    assert ("start", 1) not in group.said
    group.wake("weights")
    assert ("start", 1) not in group.said
    group.wake("kv_cache")
    assert group.said[-1] == ("start", 1)


def test_an_engine_that_is_still_starting_is_waited_for_and_sleeps_too(group):
    group._replace(0, group.engines[0], RuntimeError("killed"))
    assert group.said == [("start", 0)]
    group.sleep()
    assert group.said[1:] == [("sleep", 0), ("sleep", 1)]


def test_engines_on_machines_of_their_own_never_sleep(group):
    group._sleeps = False
    group.sleep()
    group.wake()
    assert group.said == []
