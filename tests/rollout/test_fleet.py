import pytest

from meds_megatron.errors import UserError
from meds_megatron.rollout.fleet import Fleet, Health


def test_an_engine_is_used_from_its_weights_on():
    fleet = Fleet(2, max_failures=1)
    assert fleet.having(Health.STARTING) == [0, 1]
    fleet.started(1)
    assert fleet.having(Health.STALE) == [1]
    fleet.filled(1)
    assert fleet.having(Health.FRESH) == [1]
    assert fleet.having(Health.STARTING, Health.FRESH) == [0, 1]


def test_an_update_makes_stale_until_its_end():
    fleet = Fleet(1, max_failures=1)
    fleet.started(0)
    fleet.filled(0)
    fleet.update_began(0)
    assert fleet.having(Health.FRESH) == []
    fleet.filled(0)
    assert fleet.having(Health.FRESH) == [0]


def test_an_engine_that_failed_begins_again():
    fleet = Fleet(2, max_failures=2)
    for engine in (0, 1):
        fleet.started(engine)
        fleet.filled(engine)
    fleet.failed(0, "killed")
    assert (fleet.having(Health.STARTING), fleet.having(Health.FRESH), fleet.restarts) == ([0], [1], 1)


def test_failures_in_a_row_end_the_run_and_a_generation_between_them_does_not():
    fleet = Fleet(1, max_failures=2)
    for _ in range(2):
        fleet.failed(0, "killed")
    fleet.generated(0)
    for _ in range(2):
        fleet.failed(0, "killed")
    with pytest.raises(UserError, match="engine 0 failed 3 times in a row .* last words: out of memory"):
        fleet.failed(0, "out of memory")
    assert fleet.restarts == 4
