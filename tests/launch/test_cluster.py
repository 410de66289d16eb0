import os
import subprocess
import sys

import pytest
import ray

from meds_megatron.config import ClusterConfig
from meds_megatron.launch.cluster import TOKEN, ray_cluster

CONNECT = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("nodes:", len(ray.nodes()))
"""


@pytest.fixture(scope="module")
def address(own_ray):
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
    with connect(address, {"RAY_AUTH_MODE": "token"}) as user:
        assert "nodes: 1\n" in user.stdout


def test_the_token_is_the_users_alone(address):
    assert TOKEN.is_file() and TOKEN.stat().st_mode & 0o777 == 0o600


def connect(address: str, variables: dict[str, str]) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-c", CONNECT, address],
        env=kept | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
