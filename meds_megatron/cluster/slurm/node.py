"""`python -m meds_megatron.cluster.slurm.node CONFIG [KEY=VALUE]...`: the task of a Slurm job on one of its nodes.

Every task runs Ray until the job is over; the first one has Ray's head and the process of `meds train`.
`cluster.slurm.job` starts the tasks and sends them commands over a connection; a task whose connection ends stops by
itself.

Nothing collides with another job on the node: Ray's and all temporary files are in a directory of this start of the
job, every port is one that was free, and only descendants of this process are ended.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.connection import Client
from pathlib import Path

from meds_megatron import processes, shared_memory
from meds_megatron.cluster.ray_cluster import RAY_SETTINGS
from meds_megatron.cluster.ray_directory import TOKEN_VARIABLE, base_directory, write_token
from meds_megatron.cluster.slurm.environment import SlurmJob, exit_code, present_jobs
from meds_megatron.config import Config, load_config
from meds_megatron.config.schema import FaultsConfig
from meds_megatron.config.validate import validate
from meds_megatron.errors import EXIT_FAILURE, EXIT_REQUEUE, EXIT_USER_ERROR, UserError

KILL_SECONDS = 5
START_TRIES = 3
DIRECTORY = re.compile(r"meds-(\d+)\.\d+")
"""Name of a job's directory on a node, with the job's id."""


class NodeTask:
    """The processes of a job on this node. `address` is that of `cluster.slurm.job`, on the first node; a run that
    SIGTERM does not end within `faults.cancel_seconds` is killed."""

    def __init__(
        self,
        job: SlurmJob,
        number: int,
        address: tuple[str, int],
        token: str,
        train: Sequence[str],
        faults: FaultsConfig,
    ):
        self._number, self._address, self._token, self._train = number, address, token, train
        self._faults = faults
        self.directory = make_directory(job)
        self._environment = environment(self.directory, token)
        self._driver: subprocess.Popen | None = None
        self._requested: int | None = None
        """Signal that the driver is to get."""
        self._ray_address: str | None = None

    def run(self) -> None:
        """Returns when the job is over."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        with Client(self._address, authkey=self._token.encode()) as connection, ExitStack() as stack:
            stack.callback(self._clean_up)
            connection.send((self._number, self._faults.start_minutes))
            self._send = connection.send
            if self._number == 0:
                self._start_head()
            while True:
                try:
                    message, value = connection.recv()
                except (EOFError, ConnectionError):
                    return
                if message == "end":
                    return
                self._on_message(message, value)

    def _on_message(self, message: str, value: str | None) -> None:
        if message == "join":
            self._ray_address = value
            if self._number > 0:
                self._start_ray(f"--address={value}")
            self._send(("ready", self._number))
        elif message == "run":
            threading.Thread(target=self._run_driver, daemon=True).start()
        elif message in ("save", "terminate"):
            self._signal_driver(signal.SIGUSR1 if message == "save" else signal.SIGTERM)

    def _on_signal(self, number: int, _) -> None:
        """Slurm sends a job's signals to every task, and where it does not use cgroups to every process."""
        self._signal_driver(number)
        if number != signal.SIGUSR1:
            # The end of the run comes over the connection; this is for a run that does not end.
            signal.signal(signal.SIGALRM, self._on_alarm)
            signal.alarm(self._faults.cancel_seconds)

    def _on_alarm(self, *_) -> None:
        raise SystemExit(EXIT_FAILURE)

    def _start_head(self) -> None:
        for _ in range(START_TRIES):
            self._ray_address = f"{self._address[0]}:{free_port()}"
            port = self._ray_address.rpartition(":")[2]
            extra = [f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
            try:
                self._start_ray("--head", f"--port={port}", *extra)
            except RuntimeError as error:
                reason = error
            else:
                self._send(("address", self._ray_address))
                return
        raise reason

    def _start_ray(self, *options: str) -> None:
        """Raises RuntimeError, with what Ray printed, if it does not start."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *options),
            *(f"--node-ip-address={own_address(self._address)}", f"--temp-dir={self.directory}/ray"),
            *("--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"),
            *("--disable-usage-stats", *gpu_options()),
        ]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, preexec_fn=_ignore_save_signal
        )
        if done.returncode != 0:
            raise RuntimeError(f"Ray did not start on {socket.gethostname()}:\n{done.stdout}{done.stderr}")

    def _run_driver(self) -> None:
        code = self._run_command("check", "--no-links") or self._run_command("train")
        if code == -signal.SIGUSR1:
            code = EXIT_REQUEUE  # Before the run handled signals: there is nothing to save.
        self._send(("ended", exit_code(code)))

    def _run_command(self, *command: str) -> int:
        line = [sys.executable, "-m", "meds_megatron.cli", *command, *self._train]
        line.append(f"cluster.address={self._ray_address}")
        self._driver = subprocess.Popen(line, env=self._environment, preexec_fn=processes.ends_with_parent)
        if self._requested is not None:
            # The signal may have come before there was a process to get it.
            self._driver.send_signal(self._requested)
        return self._driver.wait()

    def _signal_driver(self, number: int) -> None:
        self._requested = number
        if self._driver is not None and self._driver.poll() is None:
            self._driver.send_signal(number)

    def _clean_up(self) -> None:
        """Ends all processes of the job on this node and removes what they leave behind."""
        left = shared_memory.entries_of(processes.descendants())
        processes.kill_descendants(KILL_SECONDS)
        shared_memory.remove_entries(left | {self.directory})
        shared_memory.remove_unclaimed()


def _ignore_save_signal() -> None:
    """Ignores SIGUSR1: without cgroups Slurm sends a job's signal to every process of its steps, and most end at it by
    default. All of Ray's processes inherit this."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def make_directory(job: SlurmJob) -> Path:
    """A new directory for temporary files on this node. Those of earlier starts of the job are removed, and those of
    jobs that ended without removing them, as all their processes were killed."""
    base = base_directory(f"meds-{job.label}")
    for left in left_directories(base, job):
        shutil.rmtree(left, ignore_errors=True)
    directory = base / f"meds-{job.label}"
    directory.mkdir(mode=0o700)
    return directory


def left_directories(base: Path, job: SlurmJob) -> list[Path]:
    """Directories of this user's in `base` that belong to earlier starts of `job` and to jobs that have ended."""
    jobs = {path: match[1] for path in base.iterdir() if (match := DIRECTORY.fullmatch(path.name)) and _is_own(path)}
    if set(jobs.values()) <= {job.id}:
        return list(jobs)
    # Asked after the directories were listed: none of them is a job's that has started since.
    present = present_jobs()
    # An answer without this job is about other jobs, of a container's user perhaps.
    ended = set(jobs.values()) - present if present is not None and job.id in present else set()
    return [path for path, id in jobs.items() if id == job.id or id in ended]


def _is_own(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.getuid()
    except FileNotFoundError:
        return False


def environment(directory: Path, token: str) -> dict[str, str]:
    """Environment of the job's processes on this node; Ray takes only those into the cluster that know the token."""
    return {
        **os.environ,
        "TMPDIR": str(directory),
        **{f"RAY_{name}": str(value) for name, value in RAY_SETTINGS.items()},
        "RAY_AUTH_MODE": "token",
        TOKEN_VARIABLE: str(write_token(directory, token)),
        "PYTHONUNBUFFERED": "1",
    }


def gpu_options() -> list[str]:
    """The GPUs that Slurm gave this task; without such a list Ray finds those of the node by itself."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [] if visible is None else [f"--num-gpus={len([gpu for gpu in visible.split(',') if gpu])}"]


def own_address(peer: tuple[str, int]) -> str:
    """The address of this node on its way to `peer`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(peer)
        return probe.getsockname()[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def job_settings(config: Config, nodes: int, overrides: Sequence[str]) -> list[str]:
    """Overrides that fit `config` to a job of `nodes` nodes.

    All nodes but those of `rollout.nodes` are the trainer's. The number of engines grows with the nodes that they are
    on, unless `overrides` sets it.
    """
    trainer_nodes = nodes - (config.rollout.nodes or 0)
    if trainer_nodes < 1:
        raise UserError(
            f"rollout.nodes = {config.rollout.nodes}, but the job has {nodes} nodes and the trainer needs one; "
            "start it with more (sbatch --nodes=...) or lower rollout.nodes."
        )
    settings = [f"cluster.nodes={trainer_nodes}"]
    engines, remainder = divmod(config.rollout.engines * trainer_nodes, config.cluster.nodes)
    chosen = any(override.partition("=")[0] == "rollout.engines" for override in overrides)
    if config.rollout.nodes is None and not chosen and trainer_nodes != config.cluster.nodes:
        if remainder:
            raise UserError(
                f"rollout.engines = {config.rollout.engines} on cluster.nodes = {config.cluster.nodes} nodes cannot be "
                f"scaled to the job's {nodes} nodes; set rollout.engines=..."
            )
        settings.append(f"rollout.engines={engines}")
    return settings


def main(arguments: Sequence[str]) -> int:
    job = SlurmJob.from_environment()
    assert job is not None
    number = int(os.environ["SLURM_PROCID"])
    given = json.loads(sys.stdin.readline())
    config_file, *overrides = arguments
    try:
        settings = job_settings(load_config(config_file, overrides), job.nodes, overrides)
        config = load_config(config_file, [*overrides, *settings])
        validate(config)
    except UserError as error:
        if number == 0:
            print(f"meds: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    processes.adopt_orphans()
    # Slurm's name for the address from which the tasks were started, that of the first node.
    address = (os.environ["SLURM_LAUNCH_NODE_IPADDR"], given["port"])
    train = [*arguments, *settings]
    NodeTask(job, number, address, given["token"], train, config.faults).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
