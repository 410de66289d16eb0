"""Engines that are the cause of a run without progress."""

import pytest

from meds_megatron.faults.supervised import Activity
from meds_megatron.rollout.engine import MAY_WAIT, RolloutEngine
from meds_megatron.rollout.engine_record import Engine
from meds_megatron.rollout.health import EngineHealth, EngineState


@pytest.mark.parametrize(
    ("state", "activity", "hangs"),
    [
        (EngineState.FRESH, None, True),
        (EngineState.STALE, None, True),
        (EngineState.FRESH, Activity("_decode_step"), True),
        (EngineState.STALE, Activity("load_bucket"), False),
        (EngineState.FRESH, Activity(None), False),
        (EngineState.STARTING, None, False),
        (EngineState.STARTING, Activity("start"), False),
    ],
    ids=["no answer", "no answer in an update", "generates", "waits for ranks", "idle", "no process yet", "loads"],
)
def test_an_engine_hangs_unless_it_starts_is_idle_or_waits_for_the_trainer(state, activity, hangs):
    engine = Engine(0, node=0, options={}, health=EngineHealth(0, 3, state))
    assert engine.hangs(activity) is hangs


def test_the_methods_that_wait_for_the_trainer_are_methods():
    assert all(callable(getattr(RolloutEngine, name)) for name in MAY_WAIT)
