"""A Ray that a run starts: who gets in, where its files are, and what it prints."""

import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray
from ray._private.parameter import RayParams
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.config import ClusterConfig
from tests.limits import HANG_SECONDS

CONNECT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("nodes:", len(ray.nodes()))
"""


@pytest.fixture(scope="module")
def address(own_ray):
    with pytest.MonkeyPatch.context() as patch:
        # Any free port for Ray's agent: another Ray of this machine may have the usual one.
        init = RayParams.__init__
        free = tuple(0 if value == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT else value for value in init.__defaults__)
        patch.setattr(init, "__defaults__", free)
        with ray_cluster(ClusterConfig()):
            yield ray.get_runtime_context().gcs_address


@pytest.mark.parametrize(
    "variables",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["without a token", "with another token"],
)
def test_a_cluster_that_a_run_starts_refuses_strangers(address, variables):
    with connect(address, variables) as stranger:
        # It tries again for minutes: the first refusal is enough.
        assert any("InvalidAuthToken" in line for line in stranger.stdout)
        stranger.kill()
    assert stranger.returncode != 0


def test_whoever_has_the_token_is_let_in(address):
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    with connect(address, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}) as user:
        assert "nodes: 1\n" in user.stdout


def test_all_files_of_ray_are_in_a_directory_that_only_the_user_can_enter(address):
    directory = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    (node,) = ray.nodes()
    assert Path(node["RayletSocketName"]).is_relative_to(directory)
    assert Path(node["ObjectStoreSocketName"]).is_relative_to(directory)


def test_nothing_but_a_sign_of_life_is_served_without_the_token(address):
    (node,) = ray.nodes()
    assert not is_port(node["MetricsExportPort"])
    assert is_port(node["DashboardAgentListenPort"])
    agent = f"http://{node['NodeManagerAddress']}:{node['DashboardAgentListenPort']}"
    assert urllib.request.urlopen(f"{agent}/api/local_raylet_healthz").read() == b"success"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{agent}/api/job_agent/jobs/", data=b"{}")


def test_what_ray_says_of_a_death_is_in_the_log_and_not_on_the_terminal(address, capfd, caplog):
    @ray.remote(num_cpus=0)
    class Victim:
        def process(self) -> int:
            return os.getpid()

        def warn(self) -> None:
            print("a warning of an actor")

    victim = Victim.remote()
    process = ray.get(victim.process.remote())
    ray.get(victim.warn.remote())
    with caplog.at_level(logging.INFO):
        os.kill(process, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(victim.process.remote())
        wait_until(lambda: any("(raylet)" in message and "died" in message for message in caplog.messages))
    output = ""

    def seen() -> bool:
        nonlocal output
        output += "".join(capfd.readouterr())
        return "a warning of an actor" in output

    wait_until(seen)
    assert "raylet" not in output


def is_port(number: int) -> bool:
    """Ray's record of none is another number."""
    return 0 < number < 2**16


def wait_until(condition) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def connect(address: str, variables: dict[str, str]) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, address],
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
