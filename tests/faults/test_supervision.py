"""Real actors that die, stop and wait for each other: the one that is the cause is named."""

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from meds_megatron.errors import RunFailed, Stopped, UserError
from meds_megatron.faults.interruption import Interruption
from meds_megatron.faults.recovery import Failure
from meds_megatron.faults.supervised import CONCURRENCY_GROUPS
from meds_megatron.faults.supervision import HardwareFailed, ProcessDied, Supervisor
from meds_megatron.faults.watchdog import Hung, Watchdog
from meds_megatron.logs import process_logging
from meds_megatron.reward.grading import GraderPool
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.main import failure_of
from tests.faults.supervised_member import Member
from tests.limits import HANG_SECONDS


@pytest.fixture
def members(shared_ray, tmp_path):
    """Two actors in one process group, their supervisor and their process ids."""
    actor_class = ray.remote(num_cpus=0, concurrency_groups=CONCURRENCY_GROUPS)(Member)
    actors = [actor_class.remote(str(tmp_path), number) for number in range(2)]
    with process_logging(tmp_path, "driver", logging.NullHandler()), Supervisor(str(tmp_path)) as supervisor:
        for number, actor in enumerate(actors):
            supervisor.supervise("trainer rank", number, f"member{number}", actor)
        supervisor.results([actor.join.remote(str(tmp_path / "store"), 2) for actor in actors])
        processes = [process.identity.result(HANG_SECONDS)[1] for process in supervisor.processes]
        yield SimpleNamespace(actors=actors, supervisor=supervisor, processes=processes)
        for actor in actors:
            ray.kill(actor)
    assert not [process for process in processes if psutil.pid_exists(process)], "gone when the supervisor ends"


def watchdog(minutes: float, supervisor: Supervisor) -> Watchdog:
    pool = SimpleNamespace(finished_requests=0, engines=[])
    return Watchdog(minutes, supervisor, PhaseTimer(), pool, GraderPool(workers=1, timeout_seconds=1))


def test_results_are_in_order_and_a_mistake_of_the_user_is_raised_as_it_is(members):
    numbers = [members.actors[1].number.remote(), members.actors[0].number.remote()]
    assert members.supervisor.results(numbers) == [1, 0] and members.supervisor.results([]) == []
    with pytest.raises(UserError, match=r"data\.train is empty"):
        members.supervisor.results([members.actors[0].refuse.remote(), members.actors[1].reduce.remote()])


def test_the_process_that_died_is_named_and_not_its_peer_that_lost_the_connection(members):
    waiting = [members.actors[0].reduce.remote()]
    os.kill(members.processes[1], signal.SIGKILL)
    with pytest.raises(ProcessDied) as raised:
        members.supervisor.results(waiting)
    assert str(raised.value).startswith(f"trainer rank 1 (process {members.processes[1]} on ")
    assert "member 1 of 2 joined" in str(raised.value) and "trainer rank 0" not in str(raised.value)


@pytest.mark.parametrize("name", ["AcceleratorError", "DistBackendError"])
def test_a_live_process_whose_hardware_failed_is_named(members, name):
    with pytest.raises(HardwareFailed) as raised:
        members.supervisor.results([members.actors[1].fail.remote(name)])
    assert str(raised.value).startswith(f"trainer rank 1 (process {members.processes[1]} on ")
    assert str(raised.value).endswith(("ECC error encountered", "network error"))
    assert failure_of(raised.value) is Failure.DIED


def test_too_little_memory_is_not_a_failure_of_hardware(members):
    with pytest.raises(ray.exceptions.RayTaskError, match="CUDA out of memory") as raised:
        members.supervisor.results([members.actors[1].fail.remote("OutOfMemoryError")])
    assert not isinstance(raised.value, RunFailed)


def test_a_death_is_noticed_while_the_driver_waits_for_something_else(members):
    os.kill(members.processes[0], signal.SIGKILL)
    assert isinstance(members.supervisor.alarm.exception(HANG_SECONDS), ProcessDied)


def test_processes_that_die_together_are_named_together(members):
    for process in members.processes:
        os.kill(process, signal.SIGKILL)
    text = str(members.supervisor.alarm.exception(HANG_SECONDS))
    assert "trainer rank 0" in text and "trainer rank 1" in text


def test_a_stopped_process_is_named_and_its_peers_write_their_stacks(members, tmp_path):
    os.kill(members.processes[1], signal.SIGSTOP)
    waiting = [member.reduce.remote() for member in members.actors]
    with watchdog(0.05, members.supervisor), pytest.raises(Hung) as raised:
        members.supervisor.results(waiting)
    text = str(raised.value)
    assert "trainer rank 0 in reduce (all_reduce, " in text
    assert f"trainer rank 1 does not answer (process {members.processes[1]} on " in text and "stopped)" in text
    for process in ("member0", "driver"):
        assert "most recent call first" in Path(tmp_path / "logs" / f"{process}.log").read_text()
    assert " in reduce\n" in Path(tmp_path / "logs" / "member0.log").read_text()


def test_a_collective_that_a_peer_does_not_join_is_named(members):
    waiting = [members.actors[0].reduce.remote()]
    with (
        watchdog(0.05, members.supervisor),
        pytest.raises(Hung, match=r"trainer rank 0 in reduce .*trainer rank 1 idle"),
    ):
        members.supervisor.results(waiting)


def test_work_is_progress(members):
    with watchdog(0.1, members.supervisor):
        members.supervisor.results([members.actors[0].work_for.remote(9.0)])
    assert not members.supervisor.alarm.done()


def test_a_stop_ends_the_start_of_a_run(tmp_path):
    interruption = Interruption()
    with Supervisor(str(tmp_path), interruption) as supervisor:
        interruption.requested.set_result(signal.SIGTERM)
        with pytest.raises(Stopped) as stop:
            supervisor.alarm.result(HANG_SECONDS)
        assert stop.value.exit_code == 75


def test_a_stop_is_the_loops_once_the_run_has_started(tmp_path):
    interruption = Interruption()
    with Supervisor(str(tmp_path), interruption) as supervisor:
        supervisor.started()
        interruption.requested.set_result(signal.SIGTERM)
    assert not supervisor.alarm.done()
