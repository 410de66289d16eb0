import pytest

from meds_megatron.errors import UserError
from meds_megatron.rollout.health import EngineHealth, EngineState


def test_an_engine_is_fresh_after_its_first_weights():
    health = EngineHealth(0, max_failures=1)
    assert health.state is EngineState.STARTING
    health.started()
    assert health.state is EngineState.STALE
    health.updated()
    assert health.state is EngineState.FRESH


def test_an_engine_is_stale_until_the_end_of_an_update():
    health = EngineHealth(0, max_failures=1, state=EngineState.FRESH)
    health.update_began()
    assert health.state is EngineState.STALE
    health.updated()
    assert health.state is EngineState.FRESH


def test_a_failed_engine_starts_again():
    health = EngineHealth(0, max_failures=2, state=EngineState.FRESH)
    health.failed("killed")
    assert (health.state, health.restarts) == (EngineState.STARTING, 1)


def test_failures_in_a_row_end_the_run_and_a_generation_between_them_does_not():
    health = EngineHealth(0, max_failures=2)
    for _ in range(2):
        health.failed("killed")
    health.generated()
    for _ in range(2):
        health.failed("killed")
    with pytest.raises(UserError, match=r"engine 0 failed 3 times in a row .* the last error: out of memory"):
        health.failed("out of memory")
    assert health.restarts == 4
