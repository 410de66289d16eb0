"""The death of Ray's own processes: it is noticed, and a Ray of the run's own is started again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import ray

from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.cluster.ray_probe import RayProbe
from meds_megatron.config import ClusterConfig
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("own_ray")


@pytest.mark.parametrize("part", ["GCS", "raylet"])
def test_a_ray_whose_own_process_died_is_started_again(part):
    deaths, others = [], []
    reports = (deaths.append, others.append) if part == "GCS" else (others.append, deaths.append)
    with ray_cluster(ClusterConfig()) as cluster:
        directory = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
        with RayProbe(*reports) as probe:
            assert probe.death() is None
            (process,) = processes_of({"GCS": "gcs_server", "raylet": "raylet"}[part])
            process.kill()
            wait_until(lambda: deaths)
        assert re.fullmatch(rf"Ray's {part} \([\d.]+:\d+\) has ended", deaths[0])
        cluster.restart()
        with RayProbe(*reports) as probe:
            assert probe.death() is None and process_of_a_task() != os.getpid()
    assert len(deaths) == 1 and not others
    assert not processes_of("gcs_server") and not processes_of("raylet")
    assert not (directory / "token").exists()


def test_a_ray_that_does_not_start_in_time_is_started_again_and_leaves_nothing(monkeypatch):
    start, left = ray.init, []

    def late(**settings):
        if not left:
            left.append(subprocess.Popen(["sleep", "1000"]))
            raise Exception("The current node timed out during startup")
        return start(**settings)

    monkeypatch.setattr(ray, "init", late)
    with ray_cluster(ClusterConfig()):
        assert left[0].wait(HANG_SECONDS) == -signal.SIGKILL
        assert process_of_a_task() != os.getpid()


def process_of_a_task() -> int:
    """Process id of a worker of Ray."""

    # A function within a function is pickled by value: the worker cannot import this module.
    def process() -> int:
        return os.getpid()

    return ray.get(ray.remote(process).remote())


def processes_of(name: str) -> list[psutil.Process]:
    """Live children of this process, by the name of their program."""
    return [p for p in psutil.Process().children() if p.name() == name and p.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
