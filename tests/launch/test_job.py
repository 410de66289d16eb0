"""The batch process of a Slurm job, as far as it needs no Slurm (tests/slurm has the rest)."""

import subprocess
import sys
from pathlib import Path

from meds_megatron.launch.slurm import SlurmJob

ROOT = Path(__file__).resolve().parents[2]


def test_it_needs_no_more_than_python():
    """Outside of a container there may be nothing else: -S leaves installed packages out, -E the environment."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from meds_megatron.launch.job import main; sys.exit(main())"
    )
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
    job = SlurmJob.from_environment({"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "3"})
    command = job.srun(["--container-image=x"], ["python"])
    assert {"--nodes=3", "--ntasks=3", "--wait=0", "--kill-on-bad-exit=0"} <= set(command)
    assert command[-2:] == ["--container-image=x", "python"]
