"""Recovery from a failed attempt."""

import pytest

from meds_megatron.faults.recovery import Decision, Failure, Recovery


def decisions(recovery: Recovery, *events) -> list[Decision]:
    """A number is a finished step."""
    found = []
    for event in events:
        found += [recovery.failed(event)] if isinstance(event, Failure) else [recovery.finished(event)]
    return [decision for decision in found if decision is not None]


@pytest.mark.parametrize("failure", [Failure.DIED, Failure.HUNG])
def test_restarts_in_a_row_are_bounded(failure):
    recovery = Recovery(max_restarts=2, furthest=0)
    assert decisions(recovery, failure, failure, failure) == [Decision.RESTART, Decision.RESTART, Decision.STOP]


def test_a_new_step_sets_the_count_back():
    recovery = Recovery(max_restarts=1, furthest=0)
    found = decisions(recovery, Failure.DIED, 1, Failure.HUNG, 2, Failure.DIED, 3, Failure.DIED)
    assert found == [Decision.RESTART] * 4


def test_steps_that_are_repeated_from_a_checkpoint_are_no_progress():
    """A run that always dies in step 13 and has its checkpoint at step 10 ends."""
    recovery = Recovery(max_restarts=2, furthest=0)
    found = decisions(recovery, *[11, 12, Failure.DIED] * 3)
    assert found == [Decision.RESTART, Decision.RESTART, Decision.STOP]


def test_without_restarts_the_first_death_ends_the_run():
    assert Recovery(max_restarts=0, furthest=0).failed(Failure.DIED) is Decision.STOP


def test_a_failure_after_a_stop_was_requested_ends_the_run_for_the_scheduler_to_start_again():
    recovery = Recovery(max_restarts=3, furthest=0)
    recovery.stop_requested()
    assert decisions(recovery, Failure.DIED, Failure.HUNG) == [Decision.REQUEUE] * 2


def test_missing_nodes_are_a_mistake_at_first_and_a_lost_node_later():
    recovery = Recovery(max_restarts=3, furthest=0)
    assert recovery.failed(Failure.NO_NODES) is Decision.STOP
    assert decisions(recovery, 1, Failure.DIED, Failure.NO_NODES) == [Decision.RESTART, Decision.REQUEUE]


def test_a_process_that_adds_no_step_is_not_started_again_for_ever():
    """Step 20 was finished by an earlier process, and is the last of what this one repeats."""
    recovery = Recovery(max_restarts=3, furthest=20)
    assert decisions(recovery, 20, Failure.DIED, Failure.NO_NODES) == [Decision.RESTART, Decision.STOP]


def test_a_ray_of_the_runs_own_is_started_again_as_often_as_anything_else():
    recovery = Recovery(max_restarts=1, furthest=0, owns_ray=True)
    found = decisions(recovery, Failure.RAY_DIED, 1, Failure.RAY_DIED, Failure.DIED)
    assert found == [Decision.RESTART, Decision.RESTART, Decision.STOP]


def test_the_death_of_another_ray_ends_the_run_for_the_scheduler_to_start_it_again():
    assert Recovery(max_restarts=3, furthest=0).failed(Failure.RAY_DIED) is Decision.REQUEUE
