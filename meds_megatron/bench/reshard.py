"""Cost of a weight update: the resharding plan against a gather of everything, between real processes on CPUs.

Both send through the same transfer group (gloo) to engine ranks that copy their part into parameters of their own, as
vLLM's weight loaders do. A gather of everything is the common way: each pipeline stage gathers its tensors on one rank,
which sends them whole to every engine rank. The plan is also executed through the shared memory of the machine.
"""

import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor

from meds_megatron.bench.peak_memory import PeakMemory
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.shared_memory import SHARED_MEMORY
from meds_megatron.weights.gather import whole_tensors
from meds_megatron.weights.resharding.plan import engine_slices
from meds_megatron.weights.resharding.transfer import WeightReceiver, WeightSender
from meds_megatron.weights.resharding.transport import TransferGroup, open_rendezvous
from meds_megatron.weights.resharding.types import Rendezvous, SyncSpec
from meds_megatron.weights.sealed_store import SealedStore
from meds_megatron.weights.store import connect, open_store
from meds_megatron.weights.store_address import StoreAddress

KINDS = ("aligned", "gather", "memory", "copy")


def run(
    model: str = "Qwen2.5-0.5B",
    tensor: int = 2,
    pipeline: int = 2,
    engine_tensor: int = 2,
    rounds: int = 5,
) -> dict:
    """Measures weight updates in bfloat16 from `tensor` x `pipeline` trainer ranks to one engine of `engine_tensor`
    ranks, one thread each, both ways in turn.

    Keys: `bytes_aligned`, `bytes_gather` (between ranks, counted as they are sent), `aligned_s`, `gather_s`,
    `copy_bound_s` (the engine ranks copying the same bytes within their own memory; all medians of `rounds`),
    `speedup` (median of the rounds' ratios), `peak_extra_bytes` (largest sum of all processes' memory during an aligned
    update, above that before it), `memory_s` and `memory_peak_extra_bytes` (the same through shared memory, one bucket
    after the other) and `bucket_bytes` (the largest bucket).
    """
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    with tempfile.TemporaryDirectory(prefix="bench-meds-", dir=SHARED_MEMORY) as directory:
        spec = SyncSpec(QWEN[model], layout, engine_tensor, "bfloat16", directory)
        measured = Ranks(spec).measure(rounds)
    return {
        "model": model,
        "layout": f"TP{tensor} PP{pipeline} -> TP{engine_tensor}",
        **measured,
        "bucket_bytes": spec.plan().largest_bucket * 2,
        "rounds": rounds,
    }


class Ranks:
    """The processes of one measurement: trainer ranks first, then engine ranks."""

    def __init__(self, spec: SyncSpec):
        self._rendezvous, self._store = open_rendezvous("127.0.0.1", spec.layout.ranks, spec.engine_tensor)
        world = self._rendezvous.members
        self._world_store = open_store("127.0.0.1", world)
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, spec, self._rendezvous, self._world_store.address)
            self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)

    def measure(self, rounds: int) -> dict:
        try:
            bytes_of, peaks = {}, {}
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for kind in KINDS:
                self._all(kind)
                with PeakMemory([process.pid for process in self._processes if process.pid]) as memory:
                    self._all(kind)
                peaks[kind] = memory.extra
            for _ in range(rounds):
                for kind, values in seconds.items():
                    sent, took = zip(*self._all(kind), strict=True)
                    bytes_of[kind] = sum(sent)
                    values.append(max(took))
        finally:
            for process in self._processes:
                process.kill()
                process.join()
        ratios = [slow / fast for slow, fast in zip(seconds["gather"], seconds["aligned"], strict=True)]
        return {
            "bytes_aligned": bytes_of["aligned"],
            "bytes_gather": bytes_of["gather"],
            "aligned_s": statistics.median(seconds["aligned"]),
            "gather_s": statistics.median(seconds["gather"]),
            "copy_bound_s": statistics.median(seconds["copy"]),
            "memory_s": statistics.median(seconds["memory"]),
            "speedup": statistics.median(ratios),
            "peak_extra_bytes": peaks["aligned"],
            "memory_peak_extra_bytes": peaks["memory"],
        }

    def _all(self, command: str) -> list:
        """Results of the command, which every process runs."""
        for pipe in self._pipes:
            pipe.send(command)
        return [pipe.recv() for pipe in self._pipes]


def _serve(pipe: Connection, rank: int, spec: SyncSpec, rendezvous: Rendezvous, address: StoreAddress) -> None:
    torch.set_num_threads(1)
    store = connect(address, rendezvous.members)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=rendezvous.members)
    side = (_TrainerRank if rank < rendezvous.senders else _EngineRank)(spec, rank, rendezvous, store)
    while True:
        command: Callable[[], int] = getattr(side, pipe.recv())
        dist.barrier()
        side.group.sent_bytes = 0
        began = time.perf_counter()
        extra_bytes = command()
        pipe.send((side.group.sent_bytes + extra_bytes, time.perf_counter() - began))


class _TrainerRank:
    """Random weights in the shapes of a Megatron rank's parameters. Commands return the bytes that they move outside
    the transfer group."""

    def __init__(self, spec: SyncSpec, rank: int, rendezvous: Rendezvous, store: SealedStore):
        self._plan, self._signals = spec.plan(), _Signals(store)
        self._place = spec.layout.coordinates(rank)
        self._tp_group = _stage_groups(spec)[self._place.pipeline]
        self._buckets = [
            bucket for bucket in self._plan.buckets if self._plan.pipeline_stage(bucket) == self._place.pipeline
        ]
        generator = torch.Generator().manual_seed(rank)
        self._parameters = {}
        for parameter in (row for bucket in self._buckets for row in self._plan.table.buckets[bucket]):
            values = torch.empty(parameter.local_shape(spec.layout.tensor), dtype=torch.bfloat16)
            self._parameters[parameter.name] = values.uniform_(generator=generator)
        self._sender = WeightSender(spec, rank, self._parameters, "cpu", "127.0.0.1")
        self._sender.join_group(0, rendezvous, rank)
        self.group = self._sender.groups[0]

    def aligned(self) -> int:
        for bucket in self._buckets:
            self._sender.send(bucket, engine=0, checksums=False)
        return 0

    def gather(self) -> int:
        gathered = 0
        for name, local in self._parameters.items():
            parameter = self._plan.table.parameters[name]
            whole = whole_tensors(parameter, local, self._tp_group)
            if self._place.tensor != 0:
                gathered += local.nbytes if parameter.split is not None else 0
            for tensor in whole.values():
                for engine_rank in range(self._plan.engine_tensor):
                    self.group.send(tensor, engine_rank)
        return gathered

    def memory(self) -> int:
        staged = 0
        self._signals.begin()
        for bucket in self._buckets:
            handles = self._sender.stage_bucket(bucket, checksums=False).handles
            staged += sum(handle.elements * handle.dtype.itemsize for handle in handles.values())
            self._signals.send(f"{bucket}-from{self._place.tensor}", handles)
            for engine_rank in range(self._plan.engine_tensor):
                self._signals.wait(f"{bucket}-loaded{engine_rank}")
            self._sender.release_bucket(bucket)
        return staged

    def copy(self) -> int:
        return 0


class _EngineRank:
    """Parameters of an engine rank, one for each Hugging Face tensor, which the weights are copied into."""

    def __init__(self, spec: SyncSpec, rank: int, rendezvous: Rendezvous, store: SealedStore):
        self._layout, self._plan, self._signals = spec.layout, spec.plan(), _Signals(store)
        self._engine_rank = rank - spec.layout.ranks
        _stage_groups(spec)
        places = map(spec.layout.coordinates, range(spec.layout.ranks))
        senders = {(place.pipeline, place.tensor): member for member, place in enumerate(places)}
        self.group = TransferGroup(rendezvous, rank, "cpu")
        self._receiver = WeightReceiver(spec, self._engine_rank, "cpu", self.group, senders)
        self._parts, self._parameters = {}, {}
        for name, shape in self._plan.table.hf_shapes.items():
            part = engine_slices(self._plan.shape, name, shape, self._engine_rank, self._plan.engine_tensor)
            self._parts[name] = part
            self._parameters[name] = torch.zeros([s.stop - s.start for s in part], dtype=torch.bfloat16)
        # The source of `copy`: as large as the largest parameter, and read again for each.
        self._source = torch.zeros(max(p.numel() for p in self._parameters.values()), dtype=torch.bfloat16)

    def aligned(self) -> int:
        for bucket in self._plan.buckets:
            for name, tensor in self._receiver.receive(bucket, {}):
                self._load(name, tensor)
        return 0

    def gather(self) -> int:
        for bucket in self._plan.buckets:
            sender = self._plan.pipeline_stage(bucket) * self._layout.tensor
            for name, shape in self._plan.hf_shapes(bucket).items():
                tensor = torch.empty(shape, dtype=torch.bfloat16)
                self.group.receive(tensor, sender)
                self._load(name, tensor)
        return 0

    def memory(self) -> int:
        self._signals.begin()
        for bucket in self._plan.buckets:
            staged = [self._signals.wait(f"{bucket}-from{tensor}") for tensor in range(self._layout.tensor)]
            handles = {place: handle for part in staged for place, handle in part.items()}
            for name, tensor in self._receiver.receive(bucket, handles):
                self._load(name, tensor)
            self._signals.send(f"{bucket}-loaded{self._engine_rank}", {})
        return 0

    def copy(self) -> int:
        for parameter in self._parameters.values():
            parameter.view(-1).copy_(self._source[: parameter.numel()])
        return 0

    def _load(self, name: str, tensor: Tensor) -> None:
        self._parameters[name].copy_(tensor[self._parts[name]])


class _Signals:
    """Messages between the processes of a round, through the store that all of them share."""

    def __init__(self, store: SealedStore):
        self._store, self._round = store, 0

    def begin(self) -> None:
        self._round += 1

    def send(self, name: str, message: dict) -> None:
        self._store.set(f"round{self._round}-{name}", pickle.dumps(message))

    def wait(self, name: str) -> dict:
        return pickle.loads(self._store.get(f"round{self._round}-{name}"))


def _stage_groups(spec: SyncSpec) -> list[dist.ProcessGroup]:
    """The tensor-parallel group of each pipeline stage; every process of the default group calls this."""
    size = spec.layout.tensor
    return [dist.new_group(list(range(stage * size, (stage + 1) * size))) for stage in range(spec.layout.pipeline)]
