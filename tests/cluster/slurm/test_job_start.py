"""The start of a Slurm job over several nodes, and its ends that nothing else names, as far as they need no Slurm
(tests/slurm has the rest)."""

import ast
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from meds_megatron import errors
from meds_megatron.cluster.slurm import environment as slurm
from meds_megatron.cluster.slurm import job as launch_job
from meds_megatron.cluster.slurm.environment import SlurmJob
from meds_megatron.cluster.slurm.job import Job
from meds_megatron.cluster.slurm.node import make_directory
from meds_megatron.errors import EXIT_FAILURE, EXIT_REQUEUE
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")

TASKS = """
import json, os, signal, socket, sys
from multiprocessing.connection import Client
# What waits in vain ends, so that the test fails.
signal.alarm(int(sys.argv[1]))
given = json.loads(sys.stdin.readline())

def task(number, start_minutes=30.0):
    connection = Client(("localhost", given["port"]), authkey=given["token"].encode())
    connection.send((number, start_minutes))
    return connection

def stranger(sent=b""):
    connection = socket.create_connection(("localhost", given["port"]))
    connection.sendall(sent)
    return connection
"""


def run_tasks(monkeypatch, program: str, nodes: int = 2) -> int:
    """Exit code of a job of `nodes` nodes, all of whose tasks `program` plays, as srun's process."""
    command = [sys.executable, "-c", TASKS + textwrap.dedent(program), str(HANG_SECONDS)]
    monkeypatch.setattr(SlurmJob, "srun", lambda *_: command)
    monkeypatch.setattr(SlurmJob, "node_names", lambda self: [f"red{number}" for number in range(nodes)])
    return Job(SlurmJob("17", "meds", nodes, 0, None), [], sys.executable, []).run()


def test_a_task_that_connects_after_the_head_is_up_gets_its_address_once(monkeypatch, signal_handlers):
    program = """
        first, second = task(0), task(1)
        first.send(("address", "red0:6379"))
        assert first.recv() == second.recv() == ("join", "red0:6379")
        first.send(("ready", 0))
        third = task(2)
        assert third.recv() == ("join", "red0:6379")
        third.send(("ready", 2))
        second.send(("ready", 1))
        # Nothing else before: each has the address once.
        assert first.recv() == ("run", None)
        first.send(("ended", 7))
        assert [connection.recv() for connection in (first, second, third)] == 3 * [("end", None)]
    """
    assert run_tasks(monkeypatch, program, nodes=3) == 7


def test_a_start_that_lacks_nodes_ends_in_a_sentence_with_their_names(monkeypatch, signal_handlers, capfd):
    program = """
        first, second = task(0, start_minutes=0.01), task(1, start_minutes=0.01)
        first.send(("address", "red0:6379"))
        first.recv(), second.recv()
        first.send(("ready", 0))
        assert first.recv() == second.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program, nodes=4) == EXIT_FAILURE
    assert capfd.readouterr().err == (
        "meds: the job's nodes were not ready 0.01 minutes after the first (faults.start_minutes): no task has "
        "connected from red2, red3; Ray is not up on red1; see what these nodes do, or allow more time\n"
    )


def test_a_start_without_any_task_ends_in_a_sentence(monkeypatch, signal_handlers, capfd):
    monkeypatch.setattr(launch_job, "FIRST_TASK_MINUTES", 0.005)
    monkeypatch.setattr(launch_job, "STOP_SECONDS", 0.1)
    assert run_tasks(monkeypatch, "signal.pause()") == EXIT_FAILURE
    sentence = "no task of the job has connected within 0.005 minutes: no task has connected from red0, red1"
    assert capfd.readouterr().err == f"meds: {sentence}\n"


def test_a_job_that_is_stopped_while_it_starts_names_the_nodes_that_are_missing(monkeypatch, signal_handlers, capfd):
    program = """
        first = task(0)
        first.send(("address", "red0:6379"))
        assert first.recv() == ("join", "red0:6379")
        os.kill(os.getppid(), signal.SIGUSR1)
        assert first.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program) == EXIT_REQUEUE
    error = capfd.readouterr().err
    assert "nothing to save: no task has connected from red1; Ray is not up on red0" in error


def test_silent_strangers_keep_no_task_out(monkeypatch, signal_handlers):
    program = """
        strangers = [stranger() for _ in range(50)] + [stranger(b"G") for _ in range(50)]
        connection = task(0)
        connection.send(("ready", 0))
        assert connection.recv() == ("run", None)
        connection.send(("ended", 7))
        assert connection.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program, nodes=1) == 7


def test_a_connection_that_does_not_say_who_it_is_is_closed(monkeypatch, signal_handlers):
    monkeypatch.setattr(launch_job, "HANDSHAKE_SECONDS", 0.3)
    program = """
        strangers = [stranger(sent) for sent in (b"", b"G")]
        half = Client(("localhost", given["port"]), authkey=given["token"].encode())
        for connection in strangers:
            while connection.recv(100):
                pass
        try:
            half.recv()
        except EOFError:
            pass
        connection = task(0)
        connection.send(("ready", 0))
        # Beyond the limit of the handshake: it is no limit for tasks.
        late = stranger()
        while late.recv(100):
            pass
        assert connection.recv() == ("run", None)
        connection.send(("ended", 7))
        assert connection.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program, nodes=1) == 7


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (0, None),
        (1, "meds train ended with exit status 1; the lines above say why"),
        (137, "meds train was ended by SIGKILL; it may have been out of memory (sacct -j 17 --format=State,MaxRSS; "),
        (139, "meds train was ended by SIGSEGV; submit the job again, and the run continues from its last checkpoint"),
        (255, "meds train ended with exit status 255; submit the job again"),
    ],
)
def test_every_end_of_the_run_is_named(monkeypatch, signal_handlers, capfd, code, sentence):
    program = f"""
        connection = task(0)
        connection.send(("ready", 0))
        assert connection.recv() == ("run", None)
        connection.send(("ended", {code}))
        assert connection.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program, nodes=1) == code
    error = capfd.readouterr().err
    assert error.startswith(f"meds: {sentence}") if sentence else error == ""


@pytest.mark.parametrize("running", [False, True], ids=["at its start", "during the run"])
@pytest.mark.parametrize(
    ("end", "code", "sentence"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "srun was ended by SIGKILL before the run did; it may have been"),
        ("os._exit(3)", 3, "srun ended with exit status 3 before the run did; the lines above say why"),
        ("os._exit(0)", 1, "srun ended with exit status 0 before the run did; the lines above say why"),
    ],
)
def test_every_end_of_srun_is_named(monkeypatch, signal_handlers, capfd, running, end, code, sentence):
    # A process of its own plays the tasks, as on other nodes: their connections do not end with srun's process.
    program = f"""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])
        if os.fork() == 0:
            connection = task(0)
            connection.send(("address", "red0:6379"))
            assert connection.recv() == ("join", "red0:6379")
            if {running}:
                connection.send(("ready", 0))
                assert connection.recv() == ("run", None)
            os.kill(os.getppid(), signal.SIGCONT)
            assert connection.recv() == ("end", None)
            print("the task has ended by itself", flush=True)
            os._exit(0)
        signal.sigwait([signal.SIGCONT])
        {end}
    """
    assert run_tasks(monkeypatch, program, nodes=1) == code
    output = capfd.readouterr()
    assert f"meds: {sentence}" in output.err
    assert output.out == "the task has ended by itself\n"


def test_a_lost_task_is_named_by_its_node(monkeypatch, signal_handlers, capfd):
    program = """
        first, second = task(0), task(1)
        for number, connection in enumerate((first, second)):
            connection.send(("ready", number))
        assert first.recv() == ("run", None)
        first.close()
        assert second.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program) == EXIT_FAILURE
    assert capfd.readouterr().err == "meds: the task on red0 of the job is gone\n"


def test_a_task_that_is_lost_before_the_run_ends_the_job(monkeypatch, signal_handlers, capfd):
    program = """
        first, second = task(0), task(1)
        first.send(("ready", 0))
        second.close()
        assert first.recv() == ("end", None)
    """
    assert run_tasks(monkeypatch, program) == EXIT_FAILURE
    assert capfd.readouterr().err == "meds: the task on red1 of the job is gone\n"


@pytest.fixture
def slurm_commands(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """`slurm_commands(name, script)` puts a shell script in the place of a command of Slurm's."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def write(name: str, script: str) -> None:
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)

    return write


def test_the_directories_of_jobs_that_have_ended_are_removed(tmp_path, monkeypatch, slurm_commands):
    base = tmp_path / "t"
    base.mkdir()
    monkeypatch.setattr("meds_megatron.cluster.slurm.node.base_directory", lambda _: base)
    kept = ("meds-16.0", "meds-weights-3", "meds-x.0", "other")
    for name in (*kept, "meds-14.0", "meds-14.1", "meds-17.0"):
        (base / name / "ray").mkdir(parents=True)
    slurm_commands("squeue", f'test "$*" = "--noheader --user={os.getuid()} --format=%A" && echo 16 && echo 17')
    job = SlurmJob("17", "meds", 1, 1, None)
    assert make_directory(job) == base / "meds-17.1"
    assert {path.name for path in base.iterdir()} == {*kept, "meds-17.1"}


@pytest.mark.parametrize("answer", ["exit 1", "echo 18", "true"], ids=["no answer", "of others", "empty"])
def test_without_an_answer_of_slurm_no_directory_of_another_job_is_removed(
    tmp_path, monkeypatch, slurm_commands, answer
):
    base = tmp_path / "t"
    monkeypatch.setattr("meds_megatron.cluster.slurm.node.base_directory", lambda _: base)
    for name in ("meds-14.0", "meds-17.0"):
        (base / name).mkdir(parents=True)
    slurm_commands("squeue", answer)
    make_directory(SlurmJob("17", "meds", 1, 1, None))
    assert {path.name for path in base.iterdir()} == {"meds-14.0", "meds-17.1"}


def test_nodes_have_the_names_that_slurm_gives_them(slurm_commands):
    job = SlurmJob.from_environment(
        {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "red[3,7]"}
    )
    slurm_commands("scontrol", 'test "$*" = "show hostnames red[3,7]" && echo red3 && echo red7')
    assert job.node_names() == ["red3", "red7"]
    slurm_commands("scontrol", "exit 1")
    assert job.node_names() == ["node 0", "node 1"]


def test_the_batch_process_runs_in_an_old_python():
    """Outside of a container it may be 3.7."""
    for module in (launch_job, slurm, errors):
        ast.parse(Path(module.__file__).read_text(), feature_version=(3, 7))
