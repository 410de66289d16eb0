"""A real Slurm cluster on this machine: slurmctld here, and a slurmd in namespaces of its own for each node.

A node has its own network (a veth pair on a bridge), host name, processes, shared memory and temporary directory, and
eight pretend GPUs; the file system is shared, as on a cluster. Nothing outside the given directory and the bridge is
touched, and `close` ends exactly the processes that were started here.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.limits import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "nsenter", "unshare", "mount")
CPUS = 8
"""CPUs of a node, as Slurm counts them."""
GPUS = 8

NODE = """
set -e
hostname {name}
mount --make-rprivate /
mkdir -p {local}/shm {local}/tmp
mount -t tmpfs tmpfs {local}/shm
mount -t tmpfs tmpfs {local}/tmp
for kept in {kept}; do
    mkdir -p "{local}/tmp/${{kept#/tmp/}}"
    mount --bind "$kept" "{local}/tmp/${{kept#/tmp/}}"
done
mount --bind {hosts} /etc/hosts
mount --move {local}/shm /dev/shm
ln -sfn /dev/shm /run/shm 2> /dev/null || true
mount --move {local}/tmp /tmp
ip link set lo up
# The network of the node is moved in from outside.
while ! ip link show eth0 > /dev/null 2>&1; do sleep 0.1; done
ip address add {address}/24 dev eth0
ip link set eth0 up
exec slurmd -D
"""

CONFIGURATION = """
ClusterName=meds{key}
SlurmctldHost=controller({network}.254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/%n/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n/slurmd.log
SlurmctldPort={port}
SlurmdPort=6818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
SlurmdTimeout=5
SlurmdParameters=config_overrides
KillWait=30
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName={nodes} NodeHostname={nodes} NodeAddr={addresses} CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def obstacle() -> str | None:
    """Why no cluster can be made here; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]:
        return f"{', '.join(missing)} not installed (on Debian: apt-get install slurm-wlm munge iproute2 util-linux)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces: {tried.stderr.decode().strip()}"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """`nodes` nodes named node0, node1, ..., with their slurmd running. Of /tmp the nodes share only `shared`, which
    contains `directory`, and the repository."""

    def __init__(self, directory: Path, shared: Path, nodes: int = 2):
        self.directory, self._shared = directory, shared
        self.key = secrets.token_hex(2)
        self.bridge = f"meds{self.key}"
        self.network = f"10.{77 + int(self.key[:2], 16) % 100}.{int(self.key[2:], 16)}"
        self.names = [f"node{number}" for number in range(nodes)]
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(directory / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen] = {}
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        return f"{self.network}.{self.names.index(name) + 1}"

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def on_node(self, name: str, *command: str, **options) -> subprocess.CompletedProcess:
        """Runs a command in the namespaces of a node, outside of Slurm."""
        enter = ["nsenter", f"--target={self._init(name)}", "--net", "--mount", "--pid", "--uts", "--wd=/"]
        return subprocess.run([*enter, *command], env=self.environment, capture_output=True, text=True, **options)

    def processes(self, name: str) -> list[str]:
        """Command lines of a node's processes, without slurmd's own and those that have ended."""
        rows = [line.split(None, 1) for line in self.on_node(name, "ps", "-eo", "stat=,args=").stdout.splitlines()]
        own = ("slurmd", "ps ", "nsenter")
        return [command for state, command in rows if not state.startswith("Z") and not command.startswith(own)]

    def state(self, job: str) -> str:
        return dict(
            field.split("=", 1)
            for field in self.run("scontrol", "--oneliner", "show", "job", job).split()
            if "=" in field
        )["JobState"]

    def exit_code(self, job: str) -> str:
        """`code:signal` of a job that has ended."""
        fields = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(field.partition("=")[2] for field in fields if field.startswith("ExitCode="))

    def wait(self, what: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.run('squeue', '-l', check=False)}"
            time.sleep(0.3)

    def finish(self, job: str, seconds: float) -> str:
        """The state in which a job ended."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
        self.wait(lambda: self.state(job) in ended, seconds)
        return self.state(job)

    def kill(self, name: str) -> None:
        """Ends a node at once, with every process on it."""
        process = self._processes.pop(name)
        os.kill(self._child(process), signal.SIGKILL)
        process.wait()

    def boot(self, name: str) -> None:
        """Starts a node."""
        local, number = self.directory / name, self.names.index(name)
        (local / "spool").mkdir(parents=True, exist_ok=True)
        kept = [path for path in (ROOT, self._shared) if path.is_relative_to("/tmp")]
        script = NODE.format(
            name=name,
            local=local,
            kept=" ".join(map(str, kept)),
            hosts=self.directory / "hosts",
            address=self.address(name),
        )
        unshare = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        with open(local / "console.log", "a") as log:
            process = subprocess.Popen(
                [*unshare, "sh", "-c", script], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        self._processes[name] = process
        self.wait(lambda: self._child(process) is not None, HANG_SECONDS)
        outer, inner = f"{self.bridge}-{number}", f"{self.bridge}i{number}"
        subprocess.run(["ip", "link", "delete", outer], capture_output=True)
        self.run("ip", "link", "add", outer, "type", "veth", "peer", "name", inner)
        self.run("ip", "link", "set", outer, "master", self.bridge, "up")
        self.run("ip", "link", "set", inner, "netns", str(self._child(process)), "name", "eth0")

    def close(self) -> None:
        """Ends every process of the cluster and removes its network."""
        for name in [name for name in self.names if name in self._processes]:
            self.kill(name)
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            process.wait(timeout=HANG_SECONDS)
        for number in range(len(self.names)):
            subprocess.run(["ip", "link", "delete", f"{self.bridge}-{number}"], capture_output=True)
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)

    def _start(self) -> None:
        for folder in ("munge", "state"):
            (self.directory / folder).mkdir()
        hosts = [f"127.0.0.1 localhost\n{self.network}.254 controller\n"]
        hosts += [f"{self.address(name)} {name}\n" for name in self.names]
        (self.directory / "hosts").write_text("".join(hosts))
        (self.directory / "slurm.conf").write_text(
            CONFIGURATION.format(
                key=self.key,
                network=self.network,
                directory=self.directory,
                port=_free_port(),
                nodes=",".join(self.names),
                addresses=",".join(map(self.address, self.names)),
                cpus=CPUS,
                gpus=GPUS,
            )
        )
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-{GPUS - 1}]\n")
        for gpu in range(GPUS):
            (self.directory / f"gpu{gpu}").touch()
        self.run("ip", "link", "add", self.bridge, "type", "bridge")
        self.run("ip", "address", "add", f"{self.network}.254/24", "dev", self.bridge)
        self.run("ip", "link", "set", self.bridge, "up")
        self._start_munge()
        controller = "hostname controller && exec slurmctld -D -i"
        self._start_daemon("controller", "unshare", "--uts", "sh", "-c", controller)
        for name in self.names:
            self.boot(name)
        self.wait(lambda: self.idle() == self.names, 60)

    def idle(self) -> list[str]:
        """Nodes that are up and have no job."""
        return self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split()

    def _start_munge(self) -> None:
        munge = self.directory / "munge"
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (munge / "key").chmod(0o400)
        munge.chmod(0o711)
        files = [f"--{kind}={munge / kind.split('-')[0]}" for kind in ("socket", "pid-file", "log-file", "seed-file")]
        self._start_daemon("munged", "munged", "--foreground", "--force", f"--key-file={munge / 'key'}", *files)
        self.wait((munge / "socket").exists, HANG_SECONDS)

    def _start_daemon(self, name: str, *command: str) -> None:
        with open(self.directory / f"{name}.console.log", "w") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _init(self, name: str) -> int:
        """Process 1 of a node, as numbered here."""
        return self._child(self._processes[name])

    @staticmethod
    def _child(process: subprocess.Popen) -> int | None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(children[0]) if children else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
