"""The death of Ray's own processes: it is noticed, and a Ray of the run's own is started again."""

import os
import re
import time
from pathlib import Path

import psutil
import pytest
import ray

from meds_megatron.config import ClusterConfig
from meds_megatron.launch.cluster import ray_cluster
from meds_megatron.launch.ray_probe import RayProbe
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("own_ray")


@pytest.mark.parametrize("part", ["GCS", "raylet"])
def test_a_ray_whose_own_process_died_is_started_again(part):
    deaths = []
    with ray_cluster(ClusterConfig()) as cluster:
        directory = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
        with RayProbe(deaths.append) as probe:
            assert probe.death() is None
            (process,) = processes_of({"GCS": "gcs_server", "raylet": "raylet"}[part])
            process.kill()
            wait_until(lambda: deaths)
        assert re.fullmatch(rf"Ray's {part} \([\d.]+:\d+\) has ended", deaths[0])
        cluster.restart()
        with RayProbe(deaths.append) as probe:
            assert probe.death() is None and ray.get(ray.remote(lambda: 7).remote()) == 7
    assert len(deaths) == 1
    assert not processes_of("gcs_server") and not processes_of("raylet")
    assert not (directory / "token").exists()


def processes_of(name: str) -> list[psutil.Process]:
    """Live children of this process, by the name of their program."""
    return [p for p in psutil.Process().children() if p.name() == name and p.status() != psutil.STATUS_ZOMBIE]


def wait_until(condition) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
