"""The batch process of a Slurm job, as far as it needs no Slurm (tests/slurm has the rest)."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from meds_megatron.cluster.slurm import job
from meds_megatron.cluster.slurm.environment import SlurmJob
from meds_megatron.cluster.slurm.job import SAVE_SECONDS, Job
from meds_megatron.errors import EXIT_REQUEUE
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
HOUR = 3600.0


@pytest.mark.usefixtures("processes")
def test_it_needs_no_more_than_python():
    """Outside of a container there may be nothing else: -S leaves installed packages out, -E the environment."""
    insert = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    program = f"{insert}; from meds_megatron.cluster.slurm.job import main; sys.exit(main())"
    command = [sys.executable, "-E", "-S", "-c", program, "some.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, env={})
    assert done.returncode == 2
    assert done.stderr == "meds: this is no Slurm job; start it with sbatch, or `meds train` without Slurm\n"


def test_every_start_of_a_job_has_a_name_of_its_own():
    environment = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_END_TIME": "1700000000"}
    first = SlurmJob.from_environment(environment)
    second = SlurmJob.from_environment({**environment, "SLURM_RESTART_COUNT": "1"})
    assert (first.nodes, first.end_time) == (3, 1.7e9)
    assert first.label != second.label


def test_srun_starts_one_task_a_node_that_ends_by_itself():
    slurm_job = SlurmJob.from_environment({"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "3"})
    command = slurm_job.srun(["--container-image=x"], ["python"])
    assert {"--nodes=3", "--ntasks=3", "--wait=0", "--kill-on-bad-exit=0"} <= set(command)
    assert command[-2:] == ["--container-image=x", "python"]


def run_job_of_one_task(monkeypatch, program: str, end_time: float | None = None) -> int:
    """Exit code of a job whose task runs `program`: `connect()` is authenticated and has sent the task's number."""
    program = (
        "import json, socket, struct, sys\n"
        "from multiprocessing.connection import Client\n"
        "given = json.loads(sys.stdin.readline())\n"
        "def connect():\n"
        "    connection = Client(('localhost', given['port']), authkey=given['token'].encode())\n"
        "    connection.send((0, 30.0))\n"
        "    return connection\n"
    ) + textwrap.dedent(program)
    monkeypatch.setattr(SlurmJob, "srun", lambda *_: [sys.executable, "-c", program])
    return Job(SlurmJob("17", "meds", 1, 0, end_time), [], sys.executable, []).run()


@pytest.mark.usefixtures("processes")
def test_strangers_at_the_port_do_not_keep_tasks_out(monkeypatch, signal_handlers):
    """Port scanners: they connect, and send nothing, garbage or a reset."""
    program = """
        for sent in [b"", b"GET / HTTP/1.0", None] * 10:
            stranger = socket.create_connection(("localhost", given["port"]))
            if sent is None:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif sent:
                stranger.sendall(sent)
            stranger.close()
        connection = connect()
        connection.send(("ready", 0))
        assert connection.recv() == ("run", None)
        connection.send(("ended", 7))
        assert connection.recv() == ("end", None)
    """
    assert run_job_of_one_task(monkeypatch, program) == 7


@pytest.fixture
def time_passes(monkeypatch, tmp_path) -> Path:
    """A file: the job's time to save has come when it is there, however long that takes."""
    file = tmp_path / "now"

    def sleep(seconds: float) -> None:
        assert HOUR - HANG_SECONDS < seconds <= HOUR
        while not file.exists():
            time.sleep(0.02)

    clock = SimpleNamespace(sleep=sleep, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(job, "time", clock)
    return file


@pytest.mark.usefixtures("processes")
def test_the_run_saves_before_the_time_of_the_job_is_up(monkeypatch, signal_handlers, time_passes):
    program = f"""
        connection = connect()
        connection.send(("ready", 0))
        assert connection.recv()[0] == "run"
        open({str(time_passes)!r}, "w").close()
        assert connection.recv()[0] == "save"
        connection.send(("ended", 7))
        connection.recv()
    """
    assert run_job_of_one_task(monkeypatch, program, time.time() + SAVE_SECONDS + HOUR) == 7


@pytest.mark.usefixtures("processes")
def test_a_job_whose_time_is_up_before_the_run_began_is_to_be_started_again(monkeypatch, signal_handlers, time_passes):
    program = f"""
        connection = connect()
        open({str(time_passes)!r}, "w").close()
        assert connection.recv() == ("end", None)
    """
    assert run_job_of_one_task(monkeypatch, program, time.time() + SAVE_SECONDS + HOUR) == EXIT_REQUEUE
