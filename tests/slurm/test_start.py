"""The start and the unusual ends of a job of a real Slurm over two nodes; Ray and `meds` are stand-ins (stand_ins/)."""

import sys
import time
from pathlib import Path

import pytest

from tests.limits import HANG_SECONDS
from tests.slurm.cluster import ROOT, Cluster


class Start:
    """A job whose events are files in `events`."""

    def __init__(self, slurm: Cluster, events: Path):
        self._slurm, self.events = slurm, events
        self._log = events / "job.log"
        self.id = ""

    def submit(self, *overrides: str) -> None:
        path = f"{ROOT}/tests/slurm/stand_ins:{ROOT}"
        export = f"--export=ALL,PYTHONPATH={path},MEDS_EVENTS={self.events}"
        place = [f"--job-name={self.events.name}", f"--output={self._log}", f"--chdir={ROOT}"]
        script = str(ROOT / "slurm" / "meds_cpu.sbatch")
        self.id = self._slurm.run("sbatch", "--parsable", *place, export, script, *overrides)

    def wait_for(self, event: str) -> None:
        self._slurm.wait((self.events / event).exists, HANG_SECONDS)

    def end(self) -> tuple[str, str]:
        """State and exit code."""
        return self._slurm.finish(self.id, HANG_SECONDS), self._slurm.exit_code(self.id)

    def process(self, node: str, pattern: str) -> str:
        """Id of the oldest process whose command line has the pattern."""
        found = self._slurm.on_node(node, "pgrep", "--oldest", "--full", pattern, check=True)
        return found.stdout.strip()

    def kill(self, node: str, process: str) -> None:
        self._slurm.on_node(node, "kill", "-9", process, check=True)

    def directories(self) -> list[str]:
        """Directories of jobs, on all nodes."""
        listed = [self._slurm.on_node(node, "ls", "/tmp").stdout.split() for node in self._slurm.names]
        return [name for names in listed for name in names if name.startswith("meds-")]

    @property
    def log(self) -> str:
        return self._log.read_text()


@pytest.fixture
def job(slurm, tmp_path) -> Start:
    return Start(slurm, tmp_path)


def test_a_node_whose_task_connects_after_the_head_is_up_takes_part(slurm, job):
    (job.events / "node1.late").touch()
    job.submit()
    job.wait_for("ray.node0")
    # For the address to be sent to those that are there.
    time.sleep(3)
    (job.events / "go").touch()
    job.wait_for("train")
    assert (job.events / "ray.node1").exists()
    (job.events / "finish").touch()
    assert job.end() == ("COMPLETED", "0:0"), job.log
    assert job.directories() == []


def test_a_job_that_a_node_does_not_join_fails_and_names_it(slurm, job):
    (job.events / "node1.late").touch()
    job.submit("faults.start_minutes=0.05")
    assert job.end() == ("FAILED", "1:0"), job.log
    assert (
        "meds: the job's nodes were not ready 0.05 minutes after the first (faults.start_minutes): no task has "
        "connected from node1; see what these nodes do, or allow more time\n"
    ) in job.log


@pytest.mark.parametrize("killed", ["meds train", "srun"])
def test_what_is_killed_is_named(slurm, job, killed):
    job.submit()
    job.wait_for("train")
    if killed == "srun":
        job.kill("node0", job.process("node0", r"^srun "))
    else:
        job.kill("node0", (job.events / "train").read_text())
    assert job.end() == ("FAILED", "137:0"), job.log
    assert f"meds: {killed} was ended by SIGKILL" in job.log
    assert f"sacct -j {job.id}" in job.log
    # Slurm kills the tasks of an srun that is gone, and may do so before they have removed what they have.
    assert killed == "srun" or job.directories() == []


def test_what_a_killed_job_left_is_removed_by_a_later_one(slurm, job, tmp_path_factory):
    killed = Start(slurm, tmp_path_factory.mktemp("killed"))
    killed.submit()
    killed.wait_for("train")
    for node in reversed(slurm.names):
        killed.kill(node, killed.process(node, r"^\S*python -m meds_megatron.cluster.slurm.node"))
    assert killed.end() == ("FAILED", "1:0"), killed.log
    assert "meds: the task on node0 of the job is gone\n" in killed.log
    slurm.wait(lambda: slurm.idle() == slurm.names, HANG_SECONDS)
    assert killed.directories() == 2 * [f"meds-{killed.id}.0"]
    job.submit()
    job.wait_for("train")
    assert job.directories() == 2 * [f"meds-{job.id}.0"]
    (job.events / "finish").touch()
    assert job.end() == ("COMPLETED", "0:0"), job.log


STRANGERS = """
import pathlib, socket, sys, time
events, address, ports = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
connections = [socket.create_connection((address, int(port))) for port in ports for _ in range(20)]
(events / "strangers").touch()
while not (events / "finish").exists():
    time.sleep(0.1)
"""


def test_silent_strangers_do_not_keep_a_job_from_its_start(slurm, job):
    for node in slurm.names:
        (job.events / f"{node}.late").touch()
    job.submit()
    for node in slurm.names:
        job.wait_for(f"waits.{node}")
    rows = slurm.on_node("node0", "ss", "-Hltn").stdout.splitlines()
    ports = {row.split()[3].rpartition(":")[2] for row in rows} - {"6818"}
    strangers = [sys.executable, "-c", STRANGERS, str(job.events), slurm.address("node0"), *ports]
    slurm.on_node("node1", "sh", "-c", '"$@" > /dev/null 2>&1 &', "sh", *strangers, check=True)
    job.wait_for("strangers")
    (job.events / "go").touch()
    job.wait_for("train")
    (job.events / "finish").touch()
    assert job.end() == ("COMPLETED", "0:0"), job.log
