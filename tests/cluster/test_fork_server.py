"""Forks of a server in place of ordinary workers: what they inherit, and what ends with what. Programs of a few lines
stand for Ray's worker, except where Ray itself is to start, find and kill one."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import ray

from meds_megatron.actor import worker
from meds_megatron.cluster.fork_server import ForkServer
from meds_megatron.cluster.placement import Place, Placement
from meds_megatron.cluster.ray_cluster import ray_cluster
from meds_megatron.config import ClusterConfig
from meds_megatron.shared_memory import remove_unclaimed
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")

ENV_VARS = {"OMP_NUM_THREADS": "1", "MEDS_TEST": "of the server"}
IMPORTS = f"{worker.__name__}:{worker.silence_megatron.__name__}"
"""Imports something, quickly."""

DESCRIBE = """
import json, os, sys
import resource
print(json.dumps({
    "arguments": sys.argv[1:],
    "name": __name__,
    "imported": "meds_megatron.actor.worker" in sys.modules,
    "parent": os.getppid(),
    "variable": os.environ["MEDS_TEST"],
    "unset": "MEDS_ONLY_SERVER" in os.environ,
    "directory": os.getcwd(),
    "nice": os.nice(0),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "cores": sorted(os.sched_getaffinity(0)),
}))
sys.exit(0)
"""
SLEEP = """
import os, sys, time
with open(sys.argv[1] + ".partial", "w") as file:
    file.write(f"{os.getpid()} {os.getppid()}")
os.rename(sys.argv[1] + ".partial", sys.argv[1])
time.sleep(1000)
"""


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MEDS_ONLY_SERVER", "1")
            started = stack.enter_context(ForkServer(ENV_VARS, IMPORTS))
        yield started


def start(server: ForkServer, program: str, directory: Path, *arguments: str, **options) -> subprocess.Popen:
    """Starts a program as Ray starts its worker."""
    path = directory / "program.py"
    path.write_text(program)
    command = f"exec {server.py_executable} {path} {' '.join(arguments)}"
    return subprocess.Popen(["bash", "-c", command], **options)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def sleeping_fork(server: ForkServer, directory: Path) -> tuple[subprocess.Popen, int]:
    """A client and the process id of its fork, which sleeps."""
    written = directory / "process"
    client = start(server, SLEEP, directory, str(written))
    wait_until(written.exists)
    process, parent = map(int, written.read_text().split())
    assert parent == server.process.pid
    assert process != client.pid
    return client, process


def test_a_fork_has_the_imports_of_the_server_and_all_else_of_its_client(server, tmp_path):
    environment = os.environ | {"MEDS_TEST": "of the client"}
    core, niceness = min(os.sched_getaffinity(0)), os.nice(0)

    def prepare() -> None:
        os.nice(3)
        os.sched_setaffinity(0, [core])
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    client = start(
        server,
        DESCRIBE,
        tmp_path,
        "a",
        "'b c'",
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        preexec_fn=prepare,
    )
    found = json.loads(client.communicate(timeout=HANG_SECONDS)[0])
    assert found == {
        "arguments": ["a", "b c"],
        "name": "__main__",
        "imported": True,
        "parent": server.process.pid,
        "variable": "of the client",
        "unset": False,
        "directory": str(tmp_path),
        "nice": min(niceness + 3, 19),
        "files": 200,
        "cores": [core],
    }


def test_without_its_server_a_worker_starts_in_the_ordinary_way(server, tmp_path):
    server.process.kill()
    server.process.wait()
    environment = os.environ | {"MEDS_TEST": "of the client"}
    client = start(server, DESCRIBE, tmp_path, env=environment, stdout=subprocess.PIPE)
    found = json.loads(client.communicate(timeout=HANG_SECONDS)[0])
    assert (found["parent"], found["imported"]) == (os.getpid(), False)


def test_a_server_whose_imports_fail_leaves_its_clients_to_start_in_the_ordinary_way(tmp_path):
    environment = os.environ | {"MEDS_TEST": "of the client"}
    with ForkServer(ENV_VARS, "meds_megatron.no_such_module:name") as server:
        client = start(server, DESCRIBE, tmp_path, env=environment, stdout=subprocess.PIPE)
        found = json.loads(client.communicate(timeout=HANG_SECONDS)[0])
    assert found["parent"] == os.getpid()


def test_a_server_whose_imports_have_started_a_thread_does_not_fork(tmp_path):
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading, time\n"
        "def run():\n"
        "    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    )
    environment = os.environ | {"MEDS_TEST": "of the client"}
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(tmp_path)
            server = stack.enter_context(ForkServer(ENV_VARS, "starts_a_thread:run"))
        client = start(server, DESCRIBE, tmp_path, env=environment, stdout=subprocess.PIPE)
        found = json.loads(client.communicate(timeout=HANG_SECONDS)[0])
        assert server.process.wait(HANG_SECONDS) == 1
    assert found["parent"] == os.getpid()


def test_fork_and_client_end_with_each_other(server, tmp_path):
    client, process = sleeping_fork(server, tmp_path)
    client.kill()
    client.wait()
    wait_until(lambda: not Path(f"/proc/{process}").exists())

    (tmp_path / "process").unlink()
    client, process = sleeping_fork(server, tmp_path)
    os.kill(process, signal.SIGKILL)
    assert client.wait(HANG_SECONDS) == 0
    # Supervision takes an entry in /proc for a process that still has memory.
    wait_until(lambda: not Path(f"/proc/{process}").exists())


def test_signals_that_a_scheduler_sends_to_all_processes_end_neither_server_nor_client(server, tmp_path):
    client, process = sleeping_fork(server, tmp_path)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(client.pid, number)
        server.process.send_signal(number)
    other = start(server, DESCRIBE, tmp_path, env=os.environ | ENV_VARS, stdout=subprocess.PIPE)
    assert json.loads(other.communicate(timeout=HANG_SECONDS)[0])["parent"] == server.process.pid
    assert client.poll() is None
    assert running(process)
    os.kill(process, signal.SIGKILL)
    client.wait(HANG_SECONDS)


DRIVER = f"""
import sys, time
from meds_megatron.cluster.fork_server import ForkServer
with ForkServer({ENV_VARS!r}, {IMPORTS!r}) as server:
    print(server.process.pid, flush=True)
    print(server.py_executable, flush=True)
    time.sleep(1000)
"""


def test_server_and_forks_end_with_a_driver_that_is_killed(tmp_path):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    server, command = int(driver.stdout.readline()), driver.stdout.readline().strip()
    written, program = tmp_path / "process", tmp_path / "program.py"
    program.write_text(SLEEP)
    client = subprocess.Popen(["bash", "-c", f"exec {command} {program} {written}"])
    wait_until(written.exists)
    process = int(written.read_text().split()[0])
    driver.kill()
    driver.wait()
    assert client.wait(HANG_SECONDS) == 0
    wait_until(lambda: not running(process) and not running(server))
    # What its socket was in is left to the next run.
    directory = Path(command.split()[-1]).parent
    assert directory in remove_unclaimed()
    assert not directory.exists()


@pytest.mark.usefixtures("own_ray")
def test_ray_starts_finds_and_kills_an_actor_that_is_a_fork(server):
    class Actor:
        def places(self) -> tuple[int, int]:
            return os.getpid(), os.getppid()

        def wait(self) -> None:
            time.sleep(1000)

    with ray_cluster(ClusterConfig()):
        placement = Placement(ClusterConfig(), use_gpu=False, fork_servers=[server])
        assert placement.wait(HANG_SECONDS)
        actor = ray.remote(Actor).options(**placement.options(Place(0, ()), ENV_VARS)).remote()
        other = ray.remote(Actor).options(**placement.options(Place(0, ()), {"OMP_NUM_THREADS": "1"})).remote()
        (process, parent), (_, others_parent) = ray.get([actor.places.remote(), other.places.remote()])
        assert parent == server.process.pid != others_parent
        call = actor.wait.remote()
        os.kill(process, signal.SIGKILL)
        with pytest.raises(ray.exceptions.ActorDiedError, match=rf"pid: {process}\b"):
            ray.get(call)
        actor = ray.remote(Actor).options(**placement.options(Place(0, ()), ENV_VARS)).remote()
        process, _ = ray.get(actor.places.remote())
        ray.kill(actor)
        wait_until(lambda: not running(process))
