"""The death of Ray's own processes under a run: it saves and stops, and continues with a new Ray where that is its own.

Everything but the attempt is real, which stands for any: an actor that is called step by step.
"""

import os
import re
import signal
import time
from concurrent.futures import Future
from types import SimpleNamespace

import psutil
import pytest
import ray

from meds_megatron.cluster.ray_cluster import RayCluster, ray_cluster
from meds_megatron.config import ClusterConfig, Config
from meds_megatron.errors import RayDied, RayletDied, Stopped
from meds_megatron.faults.interruption import Interruption
from meds_megatron.faults.supervision import Supervisor
from meds_megatron.trainer import main
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("own_ray")


class StepByStep:
    """Attempts in whose first one a process of Ray is killed; each finishes after three steps more."""

    def __init__(self, victim: str):
        self._victim, self.attempts, self.steps, self.saved = victim, 0, 0, []

    def __call__(self, config, model_dir, prompts, run, interruption, servers) -> None:
        self.attempts += 1
        actor = new_actor()
        last = self.steps + 3
        deadline = time.monotonic() + HANG_SECONDS
        with Supervisor("", interruption) as supervisor:
            while self.steps < last or (self.attempts == 1 and time.monotonic() < deadline):
                try:
                    interruption.check()
                except Stopped as stop:
                    self.saved.append(self.steps)
                    raise interruption.stopped(f"{stop} after step {self.steps}: saved") from stop
                # A call, without an object that Ray would have to store.
                supervisor.check()
                ray.get(actor.step.remote())
                self.steps += 1
                if self.attempts == 1 and self.steps == 2:
                    process_of(self._victim).kill()
                time.sleep(0.05)

    def last_logged_step(self) -> int:
        return self.steps


def new_actor() -> ray.actor.ActorHandle:
    # A class within a function is pickled by value: the actor cannot import this module.
    class Counter:
        def step(self) -> None:
            pass

    return ray.remote(num_cpus=0)(Counter).remote()


def process_of(name: str) -> psutil.Process:
    (found,) = [p for p in psutil.Process().children() if p.name() == name and p.status() != psutil.STATUS_ZOMBIE]
    return found


def repeat(attempts: StepByStep, cluster: RayCluster, monkeypatch) -> None:
    monkeypatch.setattr(main, "attempt", attempts)
    with Interruption() as interruption:
        main.repeat_attempts(Config(), None, None, attempts, interruption, cluster)


def test_a_run_saves_after_the_death_of_the_gcs_and_goes_on_with_a_new_ray_of_its_own(monkeypatch, capsys):
    attempts = StepByStep("gcs_server")
    with ray_cluster(ClusterConfig()) as cluster:
        repeat(attempts, cluster, monkeypatch)
    assert attempts.attempts == 2 and attempts.saved == [attempts.steps - 3]
    said = capsys.readouterr().err
    assert "meds: Ray's GCS (" in said and f") has ended after step {attempts.saved[0]}: saved\n" in said
    assert "meds: restart 1 of at most 3 without a new step" in said


def test_the_death_of_the_raylet_ends_the_attempt_and_another_has_a_new_ray(monkeypatch, capsys):
    attempts = StepByStep("raylet")
    with ray_cluster(ClusterConfig()) as cluster:
        repeat(attempts, cluster, monkeypatch)
    assert attempts.attempts == 2 and not attempts.saved
    said = capsys.readouterr().err
    assert re.search(r"meds: Ray's raylet \([\d.]+:\d+\) has ended\n", said)
    assert "meds: restart 1 of at most 3 without a new step" in said


@pytest.mark.parametrize("wait", ["check", "results"])
def test_nothing_is_fetched_from_ray_after_the_death_of_the_raylet(wait, monkeypatch):
    """Ray would end the process."""
    interruption, reference = Interruption(), object()
    monkeypatch.setattr(ray, "wait", lambda references, **_: (references, []))
    monkeypatch.setattr(ray, "get", lambda _: pytest.fail("fetched"))
    with Supervisor("", interruption) as supervisor:
        interruption.raylet_died("Ray's raylet has ended")
        with pytest.raises(RayletDied, match=r"^Ray's raylet has ended$"):
            supervisor.check() if wait == "check" else supervisor.results([reference])
    interruption.forget_ray()
    with Supervisor("", interruption) as supervisor:
        supervisor.check()


def test_a_run_on_a_ray_that_is_not_its_own_saves_and_ends_to_be_started_again(monkeypatch):
    attempts = StepByStep("gcs_server")
    with ray_cluster(ClusterConfig()) as cluster:
        monkeypatch.setattr(RayCluster, "is_own", False)
        with pytest.raises(Stopped, match=r"Ray's GCS .* has ended after step \d+: saved: ended to be") as stop:
            repeat(attempts, cluster, monkeypatch)
        monkeypatch.undo()
    assert stop.value.exit_code == 75 and len(attempts.saved) == attempts.attempts == 1
    assert cluster.is_own


def test_a_signal_after_the_death_is_not_a_second_one_and_stays():
    with Interruption() as interruption:
        interruption.ray_died("Ray's GCS has ended")
        interruption.ray_died("Ray's raylet has ended")
        with pytest.raises(RayDied, match=r"^Ray's GCS has ended$") as stop:
            interruption.check()
        assert stop.value.exit_code == 75 and interruption.is_ray_dead
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + HANG_SECONDS
        while interruption.is_ray_dead:
            assert time.monotonic() < deadline
            interruption.forget_ray()
            time.sleep(0.01)
        while not interruption.requested.done():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(Stopped, match=r"^SIGTERM stopped the run$"):
            interruption.check()


def test_what_waits_for_the_start_of_a_run_ends(tmp_path):
    interruption = Interruption()
    with Supervisor(str(tmp_path), interruption) as supervisor:
        interruption.ray_died("Ray's GCS has ended")
        assert isinstance(supervisor.alarm, Future)
        with pytest.raises(RayDied, match="has ended before training continued: there was nothing new to save"):
            supervisor.alarm.result(HANG_SECONDS)


def test_a_death_that_the_runs_processes_die_of_is_named_first(monkeypatch, capsys):
    """The attempt fails before the probe has noticed."""
    sentences = iter(["Ray's raylet (1.2.3.4:5) has ended", None])
    probe = SimpleNamespace(death=lambda: next(sentences))
    failures = iter([main.ProcessDied("trainer rank 0 died"), None])
    restarts = []

    def attempt(*_):
        if error := next(failures):
            raise error

    class Probe:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return probe

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(main, "attempt", attempt)
    monkeypatch.setattr(main, "RayProbe", Probe)
    cluster = SimpleNamespace(is_own=True, restart=lambda: restarts.append(1))
    run = SimpleNamespace(last_logged_step=lambda: 0)
    main.repeat_attempts(Config(), None, None, run, Interruption(), cluster)
    assert "meds: Ray's raylet (1.2.3.4:5) has ended, and trainer rank 0 died\n" in capsys.readouterr().err
    assert len(restarts) == 1
