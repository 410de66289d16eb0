"""What resharding costs: our plan against a gather of everything, between real processes on CPUs.

Both ways send over the same links (gloo) to engine ranks that copy their part into parameters of their own, as vLLM's
weight loaders do. Gathering everything is the common way: each pipeline stage gathers its tensors on one rank, which
sends them whole to every engine rank. The plan is also carried out through the shared memory of the machine.
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
from meds_megatron.weights.gather import whole_tensors
from meds_megatron.weights.resharding.messages import SyncSpec
from meds_megatron.weights.resharding.plan import engine_box
from meds_megatron.weights.resharding.receiver import WeightReceiver
from meds_megatron.weights.resharding.sender import WeightSender
from meds_megatron.weights.resharding.transport.network import Link, Meeting, open_meeting
from meds_megatron.weights.resharding.transport.shared_memory import ROOT as SHARED_MEMORY
from meds_megatron.weights.resharding.transport.shared_memory import SharedMemory
from meds_megatron.weights.table import box_slices

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
    update, above that before it), `memory_s` and `memory_peak_extra_bytes` (the same through shared memory, one group
    after the other) and `layer_group_bytes` (the largest group).
    """
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    with tempfile.TemporaryDirectory(prefix="meds-bench-", dir=SHARED_MEMORY) as directory:
        spec = SyncSpec(QWEN[model], layout, engine_tensor, "bfloat16", directory)
        measured = Ranks(spec).measure(rounds)
    return {
        "model": model,
        "layout": f"TP{tensor} PP{pipeline} -> TP{engine_tensor}",
        **measured,
        "layer_group_bytes": spec.plan().largest_group * 2,
        "rounds": rounds,
    }


class Ranks:
    """The processes of one measurement: trainer ranks first, then engine ranks."""

    def __init__(self, spec: SyncSpec):
        self._meeting, self._store = open_meeting("127.0.0.1", spec.layout.ranks, spec.engine_tensor)
        world = self._meeting.members
        self._world_store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, spec, self._meeting, self._world_store.port)
            self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._pipes.append(ours)

    def measure(self, rounds: int) -> dict:
        try:
            self._all("prepare")
            bytes_of, seconds, peaks = {}, {kind: [] for kind in KINDS}, {}
            for kind in KINDS:
                self._all(kind)
                with PeakMemory([process.pid for process in self._processes]) as memory:
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
        """Every process does the command; their answers."""
        for pipe in self._pipes:
            pipe.send(command)
        return [pipe.recv() for pipe in self._pipes]


def _serve(pipe: Connection, rank: int, spec: SyncSpec, meeting: Meeting, port: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, meeting.members, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=meeting.members)
    link = _CountingLink(meeting, rank, "cpu")
    side = (_TrainerRank if rank < meeting.senders else _EngineRank)(spec, rank, link, store)
    while True:
        command: Callable[[], int] = getattr(side, pipe.recv())
        dist.barrier()
        link.sent_bytes = 0
        began = time.perf_counter()
        extra_bytes = command()
        pipe.send((link.sent_bytes + extra_bytes, time.perf_counter() - began))


class _CountingLink(Link):
    sent_bytes = 0

    def send(self, values: Tensor, member: int) -> None:
        self.sent_bytes += values.nbytes
        super().send(values, member)


class _TrainerRank:
    """Random weights in the shapes of a Megatron rank's parameters. Commands return what they moved beside the link."""

    def __init__(self, spec: SyncSpec, rank: int, link: Link, store: dist.TCPStore):
        self._spec, self._plan, self._rank, self._link = spec, spec.plan(), rank, link
        self._turns = _Turns(store)
        self._place = spec.layout.coordinates(rank)
        stages = [
            list(range(s * spec.layout.tensor, (s + 1) * spec.layout.tensor)) for s in range(spec.layout.pipeline)
        ]
        self._tp_group = [dist.new_group(ranks) for ranks in stages][self._place.pipeline]
        self._entries = [
            entry
            for group in self._plan.groups
            if self._plan.stage(group) == self._place.pipeline
            for entry in self._plan.table.groups[group]
            if not entry.copy
        ]

    def prepare(self) -> int:
        generator = torch.Generator().manual_seed(self._rank)
        self._parameters = {}
        for entry in self._entries:
            values = torch.empty(entry.local_shape(self._spec.layout.tensor), dtype=torch.bfloat16)
            self._parameters[entry.name] = values.uniform_(generator=generator)
        self._sender = WeightSender(
            self._spec, self._rank, self._place.tensor, self._parameters, SharedMemory(self._spec.directory)
        )
        self._sender.connect(0, self._link)
        return 0

    def aligned(self) -> int:
        for group in self._plan.groups:
            if self._plan.stage(group) == self._place.pipeline:
                self._sender.send(group, engine=0, checksums=False)
        return 0

    def gather(self) -> int:
        gathered = 0
        for entry in self._entries:
            local = self._parameters[entry.name]
            whole = whole_tensors(entry, local, self._tp_group)
            if self._place.tensor != 0:
                gathered += local.nbytes if entry.split is not None else 0
            for tensor in whole.values():
                for engine_rank in range(self._plan.engine_tensor):
                    self._link.send(tensor, self._link.receiver(engine_rank))
        return gathered

    def memory(self) -> int:
        staged = 0
        self._turns.begin()
        for group in self._plan.groups:
            if self._plan.stage(group) == self._place.pipeline:
                handles = self._sender.stage(group, checksums=False).handles
                staged += sum(handle.elements * handle.dtype.itemsize for handle in handles.values())
                self._turns.give(f"{group}-from{self._place.tensor}", handles)
                for engine_rank in range(self._plan.engine_tensor):
                    self._turns.take(f"{group}-loaded{engine_rank}")
                self._sender.release(group)
        return staged

    def copy(self) -> int:
        return 0


class _EngineRank:
    """Parameters of an engine rank, one for each Hugging Face tensor, which the weights are copied into."""

    def __init__(self, spec: SyncSpec, rank: int, link: Link, store: dist.TCPStore):
        self._spec, self._plan, self._link = spec, spec.plan(), link
        self._turns = _Turns(store)
        self._engine_rank = rank - spec.layout.ranks
        for stage in range(spec.layout.pipeline):
            dist.new_group(list(range(stage * spec.layout.tensor, (stage + 1) * spec.layout.tensor)))

    def prepare(self) -> int:
        layout = self._spec.layout
        senders = {(place.pipeline, place.tensor): r for r in range(layout.ranks) for place in [layout.coordinates(r)]}
        self._receiver = WeightReceiver(
            self._spec, self._engine_rank, "cpu", SharedMemory(self._spec.directory), self._link, senders
        )
        self._parts, self._parameters = {}, {}
        for name, shape in self._plan.table.hf_shapes.items():
            box = engine_box(self._plan.shape, name, shape, self._engine_rank, self._plan.engine_tensor)
            self._parts[name] = box_slices(box.start, box.size)
            self._parameters[name] = torch.zeros(box.size, dtype=torch.bfloat16)
        # What `copy` copies from: as large as the largest parameter, and read anew for each.
        self._source = torch.zeros(max(p.numel() for p in self._parameters.values()), dtype=torch.bfloat16)
        return 0

    def aligned(self) -> int:
        for group in self._plan.groups:
            for name, tensor in self._receiver.receive(group, {}):
                self._load(name, tensor)
        return 0

    def gather(self) -> int:
        for group in self._plan.groups:
            sender = self._plan.stage(group) * self._spec.layout.tensor
            for name, shape in self._hf_order(group):
                tensor = torch.empty(shape, dtype=torch.bfloat16)
                self._link.receive(tensor, sender)
                self._load(name, tensor)
        return 0

    def memory(self) -> int:
        self._turns.begin()
        for group in self._plan.groups:
            parts = [self._turns.take(f"{group}-from{tensor}") for tensor in range(self._spec.layout.tensor)]
            handles = {place: handle for part in parts for place, handle in part.items()}
            for name, tensor in self._receiver.receive(group, handles):
                self._load(name, tensor)
            self._turns.give(f"{group}-loaded{self._engine_rank}", {})
        return 0

    def copy(self) -> int:
        for parameter in self._parameters.values():
            parameter.view(-1).copy_(self._source[: parameter.numel()])
        return 0

    def _hf_order(self, group: int) -> list[tuple[str, tuple[int, ...]]]:
        """The tensors in the order in which a gathering rank sends them: entry by entry."""
        entries = [entry for entry in self._plan.table.groups[group] if not entry.copy]
        return [item for entry in entries for item in entry.hf_shapes().items()]

    def _load(self, name: str, tensor: Tensor) -> None:
        self._parameters[name].copy_(tensor[self._parts[name]])


class _Turns:
    """Tells other processes what lies ready, through the store that all of them have."""

    def __init__(self, store: dist.TCPStore):
        self._store, self._round = store, 0

    def begin(self) -> None:
        self._round += 1

    def give(self, name: str, message: dict) -> None:
        self._store.set(f"turn{self._round}-{name}", pickle.dumps(message))

    def take(self, name: str) -> dict:
        return pickle.loads(self._store.get(f"turn{self._round}-{name}"))
