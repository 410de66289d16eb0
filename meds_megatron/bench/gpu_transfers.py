"""Weight updates between processes, as a run makes them: staged in a node's memory, or sent over the network."""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from meds_megatron.bench.processes import Member
from meds_megatron.config import ModelShape, ParallelLayout
from meds_megatron.model import cpu_backend
from meds_megatron.weights.resharding import transport
from meds_megatron.weights.resharding.staging import begins_and_ends
from meds_megatron.weights.resharding.transfer import WeightReceiver, WeightSender
from meds_megatron.weights.resharding.transport import TransferGroup
from meds_megatron.weights.resharding.types import SyncSpec

WARM_UP = 3
"""Updates after which memory has to be flat."""
DEADLINE = timedelta(seconds=20)
ELEMENTS = 2**26
"""Elements of a message."""


@dataclass(frozen=True)
class Updates:
    equal: bool
    """Whether every engine received the trainer's values in every update."""
    growth_bytes: int
    """Most by which the GPUs' memory in use, or the files in shared memory, grew after WARM_UP."""
    seconds: float
    """Seconds of the last update."""


def staged_updates(shape: ModelShape, trainer: int | None, engines: list[int | None], updates: int) -> Updates:
    """Updates of engines from one trainer rank on the same node; processes are on the GPUs of these numbers.

    In the middle an engine dies before it reads a bucket, and another takes its place.
    """
    # Not a name that runs on this machine would clear away.
    with tempfile.TemporaryDirectory(prefix="bench-meds-", dir="/dev/shm") as directory:
        spec = SyncSpec(shape, ParallelLayout(), 1, "bfloat16", f"{directory}/weights")
        sender = Member(trainer, _send, spec)
        readers = [Member(gpu, _read, spec) for gpu in engines]
        with closing(_Ending([sender, *readers])) as ending:
            sender.receive()
            equal, used, seconds = True, [], 0.0
            for update in range(updates):
                began = time.perf_counter()
                equal &= _update(spec, sender, readers, dying=update == updates // 2)
                seconds = time.perf_counter() - began
                if update == updates // 2:
                    readers[0].end()
                    readers[0] = Member(engines[0], _read, spec)
                    ending.members.append(readers[0])
                    _update(spec, sender, readers, dying=False)
                # Twice: the first time processes still give memory back after others have looked.
                for member in (sender, *readers):
                    member.call("used")
                used.append([*(member.call("used") for member in (sender, *readers)), _size(Path(directory))])
        flat = list(zip(*used[WARM_UP:], strict=True))
        return Updates(equal, max(max(values) - values[0] for values in flat), seconds)


class _Ending:
    def __init__(self, members: list[Member]) -> None:
        self.members = members

    def close(self) -> None:
        for member in self.members:
            member.end()


def _update(spec: SyncSpec, sender: Member, readers: list[Member], dying: bool) -> bool:
    """Whether all received what was sent; with `dying` the first engine reads nothing."""
    equal, staged = True, {}
    for bucket, is_begin in begins_and_ends(spec.plan()):
        if is_begin:
            staged[bucket] = sender.call("stage", bucket)
            continue
        handles, checksums = staged.pop(bucket)
        for reader in readers[dying:]:
            equal &= reader.call("receive", bucket, handles) == checksums
        sender.call("release", bucket)
    return equal


def _send(pipe: Connection, spec: SyncSpec) -> None:
    device = _device()
    generator = torch.Generator().manual_seed(0)
    sizes = {p.name: p.local_shape(1) for p in spec.plan().table.stored}
    parameters = {
        name: torch.randn(size, generator=generator, dtype=torch.bfloat16).to(device) for name, size in sizes.items()
    }
    sender = WeightSender(spec, 0, parameters, device, "127.0.0.1")
    pipe.send(None)

    def stage(bucket: int) -> tuple:
        staged = sender.stage_bucket(bucket, checksums=True)
        return staged.handles, staged.checksums

    _serve(pipe, {"stage": stage, "release": sender.release_bucket, "used": _used})


def _read(pipe: Connection, spec: SyncSpec) -> None:
    receiver = WeightReceiver(spec, 0, _device())

    def receive(bucket: int, handles: dict) -> dict:
        for _ in receiver.receive(bucket, handles, checksums=True):
            pass
        torch.cuda.synchronize()
        return receiver.checksums

    _serve(pipe, {"receive": receive, "used": _used})


def _serve(pipe: Connection, methods: dict[str, Callable]) -> None:
    while True:
        method, *arguments = pipe.recv()
        pipe.send(methods[method](*arguments))


def _device() -> str:
    cpu_backend.install()
    return "cuda" if torch.cuda.is_available() else "cpu"


def _used() -> int:
    """Bytes in use on this process's GPU, by all processes; what torch holds unused for itself is given back first."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@dataclass(frozen=True)
class GroupReport:
    connect_s: float
    gbyte_per_s: float
    noticed_s: float
    """Seconds from the death of the engine until the trainer rank has left the group; the rank lives."""


def transfer_group(gpus: tuple[int | None, int | None]) -> GroupReport:
    """A trainer rank and an engine rank connect over the network and exchange a message; then the engine dies."""
    sender, reader = Member(gpus[0], _send_over_network), Member(gpus[1], _receive_over_network)
    with closing(_Ending([sender, reader])):
        rendezvous = sender.receive()
        # Both have started: what is measured is the connection alone.
        reader.receive()
        reader.pipe.send(rendezvous)
        connect_s, gbyte_per_s = sender.call()
        reader.process.kill()
        return GroupReport(connect_s, gbyte_per_s, sender.call())


def _send_over_network(pipe: Connection) -> None:
    transport.TIMEOUT = DEADLINE
    device = _device()
    rendezvous, store = transport.open_rendezvous("127.0.0.1", 1, 1)
    pipe.send(rendezvous)
    pipe.recv()
    group, connect_s = _timed(lambda: TransferGroup(rendezvous, 0, device, store))
    values = torch.ones(ELEMENTS, dtype=torch.bfloat16, device=device)
    group.send(values, 0)
    _, seconds = _timed(lambda: group.send(values, 0))
    pipe.send((connect_s, values.nbytes / seconds / 1e9))
    pipe.recv()
    began = time.perf_counter()
    try:
        while True:
            group.send(values, 0)
    except ConnectionError:
        group.abort()
    # The process can still use its device.
    torch.ones(1, device=device).sum().item()
    pipe.send(time.perf_counter() - began)


def _receive_over_network(pipe: Connection) -> None:
    transport.TIMEOUT = DEADLINE
    device = _device()
    pipe.send(None)
    group = TransferGroup(pipe.recv(), 1, device)
    values = torch.empty(ELEMENTS, dtype=torch.bfloat16, device=device)
    for _ in range(2):
        group.receive(values, 0)
    pipe.recv()


def _timed(work: Callable) -> tuple:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began
