"""Stand-ins for Ray and `meds` in a Slurm job, whose `cluster.slurm.job` and `cluster.slurm.node` are the real ones.

This directory is on the job's PYTHONPATH, so that every Python of the job begins here. Files in MEDS_EVENTS say what
has happened (`waits.HOST`, `ray.HOST`, `train` with its process id) and what is to happen (`HOST.late`: the node's task
waits for `go`; `finish` ends the run).
"""

import os
import socket
import sys
import time
from pathlib import Path

EVENTS, HOST = Path(os.environ["MEDS_EVENTS"]), socket.gethostname()


def wait_for(name: str) -> None:
    while not (EVENTS / name).exists():
        time.sleep(0.1)


def stand_in(module: str, *arguments: str) -> None:
    if module == "meds_megatron.cluster.slurm.node" and (EVENTS / f"{HOST}.late").exists():
        (EVENTS / f"waits.{HOST}").touch()
        wait_for("go")
    elif module == "ray.scripts.scripts":
        (EVENTS / f"ray.{HOST}").touch()
        os._exit(0)
    elif module == "meds_megatron.cli":
        if arguments[0] == "train":
            (EVENTS / "train.partial").write_text(str(os.getpid()))
            (EVENTS / "train.partial").rename(EVENTS / "train")
            wait_for("finish")
        os._exit(0)


if "-m" in sys.orig_argv:
    stand_in(*sys.orig_argv[sys.orig_argv.index("-m") + 1 :])
