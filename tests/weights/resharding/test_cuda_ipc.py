"""CUDA IPC without GPUs: staged weights through a model of torch's reference counting (torch/csrc/CudaIPCTypes.cpp).

torch gives each export a counter of 1. A reader that opened it takes 1 off when it drops the memory; the counter is
unsigned and wraps below 0. Memory that the writer drops is freed once the counters of all its exports are 0.
"""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.resharding import transport
from meds_megatron.weights.resharding.staging import begins_and_ends, staging_elements
from meds_megatron.weights.resharding.transfer import WeightReceiver, WeightSender
from meds_megatron.weights.resharding.transport import CudaIpc, ExportedBlock, GpuMemory
from meds_megatron.weights.resharding.types import SyncSpec

SHAPE = ModelShape("qwen3", 16, 4, 8, 4, 4, 24, 134, False, 1e6, 1e-6, 64)
UPDATES, ENGINES = 6, 3


class CountedMemory:
    """Exports of torch tensors with their counters, and the bytes that the writer dropped and cannot have back."""

    def __init__(self):
        self.exported: list[Tensor | None] = []
        self.counters: list[int] = []
        self.lost_bytes: dict[int, int] = {}

    def reduce_tensor(self, tensor: Tensor) -> tuple[None, tuple]:
        number = len(self.counters)
        self.counters.append(1)
        storage = tensor.untyped_storage()
        self.exported.append(weakref.ref(tensor))
        weakref.finalize(tensor, self._dropped, number, storage.nbytes())
        return None, (*range(6), 0, *range(7, 14), True, number)

    def rebuild_cuda_tensor(self, *arguments) -> Tensor:
        number = arguments[-1]
        opened = self.exported[number]().view(-1)
        weakref.finalize(opened, self._read, number)
        return opened

    def _read(self, number: int) -> None:
        self.counters[number] = (self.counters[number] - 1) % 2**64
        if self.counters[number] == 0:
            self.lost_bytes.pop(number, None)

    def _dropped(self, number: int, size: int) -> None:
        if self.counters[number] != 0:
            self.lost_bytes[number] = size


class OneExportForAll(CudaIpc):
    """Misuse: every transfer in memory of its own, whose export all engines open."""

    def __init__(self, elements: int = 0):
        super().__init__(elements)
        self._staged: dict[str, Tensor] = {}

    def put(self, name, parts, dtype):
        self._staged[name] = torch.cat([part.to(dtype).flatten() for part in parts])
        _, arguments = transport.reduce_tensor(self._staged[name])
        return GpuMemory(ExportedBlock(name, "gpu", arguments), 0, self._staged[name].numel())

    def open(self, handle):
        return transport.rebuild_cuda_tensor(*handle.block.arguments).clone()

    def drop(self, handle):
        del self._staged[handle.block.name]


@pytest.fixture
def counted(monkeypatch) -> CountedMemory:
    memory = CountedMemory()
    monkeypatch.setattr(transport, "reduce_tensor", memory.reduce_tensor)
    monkeypatch.setattr(transport, "rebuild_cuda_tensor", memory.rebuild_cuda_tensor)
    monkeypatch.setattr(transport, "_uuid", lambda index: "gpu")
    monkeypatch.setattr(transport, "_device_index", lambda uuid: "cpu")
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(synchronize=lambda: None, current_device=lambda: "cpu"))
    return memory


def update_engines(spec: SyncSpec, kind: type[CudaIpc], monkeypatch) -> tuple[CudaIpc, list[dict[str, Tensor]]]:
    """UPDATES updates of ENGINES engines. Each time one dies: before it reads its first, its second, ... bucket."""
    monkeypatch.setattr(
        "meds_megatron.weights.resharding.transfer.local_transport", lambda device, directory, n=0: kind(n)
    )
    plan = spec.plan()
    generator = torch.Generator().manual_seed(0)
    parameters = {p.name: torch.randn(p.local_shape(1), generator=generator) for p in plan.table.stored}
    sender = WeightSender(spec, 0, parameters, "cpu", "")
    engines = [WeightReceiver(spec, 0, "cpu") for _ in range(ENGINES)]
    for update in range(UPDATES):
        received: list[dict[str, Tensor]] = [{} for _ in engines]
        dying, begun, staged = update % ENGINES, 0, {}
        for bucket, is_begin in begins_and_ends(plan):
            if is_begin:
                staged[bucket] = sender.stage_bucket(bucket, checksums=False)
                continue
            for number, engine in enumerate(engines):
                if number != dying or begun < update:
                    received[number] |= dict(engine.receive(bucket, staged[bucket].handles))
            sender.release_bucket(bucket)
            begun += 1
        # The next engine at its place is another process.
        engines[dying] = WeightReceiver(spec, 0, "cpu")
        del received[dying]
    gc.collect()
    return sender._local, received


def test_every_staged_block_comes_back_whatever_the_engines_do(counted, monkeypatch):
    spec = SyncSpec(SHAPE, ParallelLayout(), 1, "bfloat16", "")
    writer, received = update_engines(spec, CudaIpc, monkeypatch)
    assert len(counted.exported) == 1
    assert counted.exported[0]().numel() == staging_elements(spec.plan(), 0, 0)
    assert writer._allocator.end == 0
    assert counted.lost_bytes == {}
    for tensors in received:
        assert set(tensors) == set(spec.plan().table.hf_shapes)
        assert all(torch.equal(tensor, received[0][name]) for name, tensor in tensors.items())


def test_the_model_finds_the_leak_of_an_export_that_several_engines_open(counted, monkeypatch):
    spec = SyncSpec(SHAPE, ParallelLayout(), 1, "bfloat16", "")
    update_engines(spec, OneExportForAll, monkeypatch)
    model_bytes = 2 * sum(spec.plan().elements(bucket) for bucket in spec.plan().buckets)
    assert sum(counted.lost_bytes.values()) > 0.9 * UPDATES * model_bytes


def test_what_does_not_fit_the_block_is_refused(counted):
    writer = CudaIpc(8)
    with pytest.raises(RuntimeError, match="bucket0 does not fit the 8 elements for staged weights"):
        writer.put("bucket0", [torch.zeros(3, 3)], torch.float32)


def test_values_arrive_as_they_were_staged(counted):
    writer, reader = CudaIpc(1000), CudaIpc()
    parts = [torch.arange(6.0).view(2, 3).T, torch.full((5,), 0.1)]
    first = writer.put("first", parts, torch.bfloat16)
    second = writer.put("second", [torch.ones(100)], torch.bfloat16)
    assert torch.equal(reader.open(first), torch.cat([part.flatten() for part in parts]).bfloat16())
    writer.drop(first)
    third = writer.put("third", [torch.zeros(20)], torch.bfloat16)
    assert third.begin == first.begin
    assert torch.equal(reader.open(second), torch.ones(100).bfloat16())
    assert torch.equal(reader.open(third), torch.zeros(20).bfloat16())
