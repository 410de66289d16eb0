"""Weights from trainer ranks to engine ranks in processes of their own, through memory and over the network."""

import os
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.resharding import transport
from meds_megatron.weights.resharding.plan import engine_slices
from meds_megatron.weights.resharding.transfer import WeightReceiver, WeightSender, checksum
from meds_megatron.weights.resharding.transport import SharedMemory, TransferGroup, open_rendezvous
from meds_megatron.weights.resharding.types import Rendezvous, SyncSpec
from meds_megatron.weights.store import connect, wait_for_members
from tests.devices import this_device

QWEN2 = ModelShape("qwen2", 16, 4, 8, 4, 4, 24, 134, False, 1e6, 1e-6, 64)
QWEN3 = ModelShape("qwen3", 16, 4, 8, 4, 4, 24, 134, True, 1e6, 1e-6, 64)

# Shape, trainer TP, PP, VPP, engine TP, type of the engines' weights.
CASES = [
    (QWEN2, 1, 1, 1, 1, "float32"),
    (QWEN3, 2, 1, 1, 2, "float32"),
    (QWEN2, 2, 2, 1, 1, "bfloat16"),
    (QWEN3, 1, 2, 2, 2, "float32"),
    (QWEN2, 2, 1, 1, 4, "bfloat16"),
    (QWEN3, 4, 1, 1, 2, "float32"),
    # More engine ranks than key and value heads.
    (replace(QWEN2, num_kv_heads=1), 1, 1, 1, 2, "float32"),
]


def hf_tensors(spec: SyncSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(s, generator=generator) for name, s in spec.plan().table.hf_shapes.items()}


def share(spec: SyncSpec, rank: int) -> dict[str, Tensor]:
    """The parameters of a trainer rank, taken from the Hugging Face tensors by the table."""
    plan, hf, place = spec.plan(), hf_tensors(spec), spec.layout.coordinates(rank)
    parameters = {}
    for parameter in plan.table.stored:
        if plan.pipeline_stage(parameter.bucket) == place.pipeline:
            local = torch.full(parameter.local_shape(spec.layout.tensor), torch.nan)
            for part in parameter.slices(place.tensor, spec.layout.tensor):
                local[part.local_slices()] = hf[part.hf_name][part.hf_slices()]
            parameters[parameter.name] = local
    return parameters


def sender_of(spec: SyncSpec, rank: int, device: str = "cpu") -> WeightSender:
    parameters = {name: tensor.to(device) for name, tensor in share(spec, rank).items()}
    return WeightSender(spec, rank, parameters, device, "127.0.0.1")


def wrong_tensors(spec: SyncSpec, engine_rank: int, received: dict[str, Tensor]) -> list[str]:
    """Names of tensors whose part for the engine rank differs in any bit from the trainer's."""
    wrong = []
    for name, whole in hf_tensors(spec).items():
        part = engine_slices(spec.shape, name, tuple(whole.shape), engine_rank, spec.engine_tensor)
        same = torch.equal(received[name].cpu()[part], whole[part].to(getattr(torch, spec.dtype)))
        if received[name].shape != whole.shape or not same:
            wrong.append(name)
    return wrong


def spec_of(case, directory) -> SyncSpec:
    shape, tensor, pipeline, virtual, engine, dtype = case
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline, virtual=virtual)
    return SyncSpec(shape, layout, engine, dtype, str(directory / "weights"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
def test_staged_weights_arrive_bit_for_bit(case, tmp_path):
    spec = spec_of(case, tmp_path)
    plan = spec.plan()
    senders = [sender_of(spec, rank) for rank in range(spec.layout.ranks)]
    receivers = [WeightReceiver(spec, rank, "cpu") for rank in range(spec.engine_tensor)]
    received: list[dict[str, Tensor]] = [{} for _ in receivers]
    compared = 0
    for bucket in plan.buckets:
        near = [
            s for rank, s in enumerate(senders) if spec.layout.coordinates(rank).pipeline == plan.pipeline_stage(bucket)
        ]
        staged = [sender.stage_bucket(bucket, checksums=True) for sender in near]
        handles = {place: handle for part in staged for place, handle in part.handles.items()}
        sums = {key: value for part in staged for key, value in part.checksums.items()}
        for receiver, tensors in zip(receivers, received, strict=True):
            tensors |= dict(receiver.receive(bucket, handles, checksums=True))
            assert receiver.checksums.items() <= sums.items()
            compared += len(receiver.checksums)
        for sender in near:
            sender.release_bucket(bucket)
        assert not os.listdir(spec.directory)
    assert compared >= len(plan.table.hf_shapes) * len(receivers) - 1
    for rank, tensors in enumerate(received):
        assert wrong_tensors(spec, rank, tensors) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
def test_sent_weights_arrive_bit_for_bit(case, tmp_path, ranks):
    spec = spec_of(case, tmp_path)
    rendezvous, store = open_rendezvous("127.0.0.1", spec.layout.ranks, spec.engine_tensor)
    results = ranks.run(rendezvous.members, send_or_receive, spec, rendezvous)
    sums = {key: value for result in results[: rendezvous.senders] for key, value in result.items()}
    for wrong, received_sums in results[rendezvous.senders :]:
        assert wrong == []
        assert received_sums and received_sums.items() <= sums.items()
    del store


def send_or_receive(rank: int, spec: SyncSpec, rendezvous: Rendezvous):
    """A member of a transfer group. A sender returns its checksums, a receiver the tensors that are wrong and its
    checksums."""
    plan = spec.plan()
    if rank < rendezvous.senders:
        sender, sums = sender_of(spec, rank, this_device()), {}
        assert sender.join_group(0, rendezvous, rank)
        for bucket in plan.buckets:
            if spec.layout.coordinates(rank).pipeline == plan.pipeline_stage(bucket):
                sums |= sender.send(bucket, engine=0, checksums=True)
        return sums
    members = {
        (place.pipeline, place.tensor): r for r in range(rendezvous.senders) for place in [spec.layout.coordinates(r)]
    }
    engine_rank = rank - rendezvous.senders
    device = this_device()
    receiver = WeightReceiver(spec, engine_rank, device, TransferGroup(rendezvous, rank, device), members)
    received, sums = {}, {}
    for bucket in plan.buckets:
        received |= dict(receiver.receive(bucket, {}, checksums=True))
        sums |= receiver.checksums
    return wrong_tensors(spec, engine_rank, received), sums


def test_a_sender_survives_the_loss_of_its_engine(tmp_path, cpu_ranks):
    spec = spec_of(CASES[0], tmp_path)
    rendezvous, store = open_rendezvous("127.0.0.1", 1, 1)
    sent, _ = cpu_ranks.run(2, send_to_an_engine_that_leaves, spec, rendezvous)
    assert sent[0] > 0 and sent[-1] == 0
    del store


def send_to_an_engine_that_leaves(rank: int, spec: SyncSpec, rendezvous: Rendezvous) -> list[int]:
    """Number of checksums of each bucket that was sent to an engine that leaves after the first one."""
    if rank == 1:
        WeightReceiver(spec, 0, "cpu", TransferGroup(rendezvous, 1, "cpu"), {(0, 0): 0}).receive(0, {})
        return []
    sender = sender_of(spec, 0)
    assert sender.join_group(0, rendezvous, 0)
    sent = [len(sender.send(bucket, engine=0, checksums=True)) for bucket in spec.plan().buckets]
    assert not sender.groups
    return sent


def test_an_engine_that_does_not_join_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(transport, "TIMEOUT", timedelta(seconds=1))
    spec = spec_of(CASES[0], tmp_path)
    sender = sender_of(spec, 0)
    rendezvous = sender.open_group(engine=3, senders=1, receivers=1)
    assert rendezvous.members == 2
    assert not sender.join_group(3, rendezvous, member=0)
    assert sender.send(0, engine=3, checksums=True) == {}
    assert "engine 3 did not connect: not all members of a transfer group joined" in caplog.text
    assert "bucket 0 is not sent to engine 3: it is not connected" in caplog.text


def test_an_engine_that_joins_and_falls_silent_fails_the_connection_in_time(cpu_ranks):
    rendezvous, store = open_rendezvous("127.0.0.1", 1, 1)
    assert cpu_ranks.run(2, connect_to_a_silent_engine, rendezvous) == [
        "a process group is not used, since its members did not answer a challenge (Operation timed out!)",
        "silent",
    ]
    del store


def connect_to_a_silent_engine(rank: int, rendezvous: Rendezvous) -> str:
    """Member 0 is silent; what the engine rank, member 1, raises, comes first in the results."""
    transport.TIMEOUT = timedelta(seconds=3)
    member = 1 - rank
    if member == 0:
        store = connect(rendezvous.store, rendezvous.members)
        wait_for_members(store, member, rendezvous.members)
        SILENT.append((store, transport._process_group(store, member, rendezvous.members, "cpu")))
        return "silent"
    with pytest.raises(ConnectionError) as caught:
        TransferGroup(rendezvous, member, "cpu")
    return str(caught.value).split(":")[0]


SILENT: list[tuple[dist.Store, dist.ProcessGroup]] = []
"""The store and process group of a silent member, open for as long as its process lives."""


class BrokenGroup:
    """NCCL's process group whose peer is gone."""

    def __init__(self):
        self.aborted = 0

    def send(self, *_):
        raise RuntimeError("NCCL communicator was aborted")

    def abort(self):
        self.aborted += 1


def test_a_group_that_fails_is_aborted_and_no_other(tmp_path):
    spec, broken, other = spec_of(CASES[0], tmp_path), BrokenGroup(), BrokenGroup()
    sender = sender_of(spec, 0)
    for engine, group in enumerate([broken, other]):
        sender.groups[engine] = TransferGroup.__new__(TransferGroup)
        sender.groups[engine]._group, sender.groups[engine]._senders = group, 1
    assert sender.send(0, engine=0, checksums=True) == {}
    assert (broken.aborted, other.aborted, list(sender.groups)) == (1, 0, [1])
    sender.close()
    assert (broken.aborted, other.aborted) == (1, 1)


def test_nccl_groups_raise_where_torchs_own_would_end_the_process(monkeypatch):
    class Group:
        Options = SimpleNamespace

        def __init__(self, store, member, members, options):
            self.variables = {name: os.environ[name] for name in transport.NCCL_RAISES}
            self.timeout = options._timeout

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    group = transport._process_group(None, 0, 2, "cuda")
    assert group.variables == {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    assert group.timeout == transport.TIMEOUT
    # Those of torch's default group are as they were.
    assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "0"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_closing_removes_what_is_staged(tmp_path):
    spec = spec_of(CASES[0], tmp_path)
    sender = sender_of(spec, 0)
    sender.stage_bucket(0, checksums=False)
    assert os.listdir(spec.directory)
    sender.close()
    assert not os.path.exists(spec.directory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_differ_for_bits_and_order(dtype):
    values = torch.randn(70_000, 20).to(dtype)
    other = values.clone()
    other[123, 4] = torch.nextafter(other[123, 4], torch.tensor(9.0, dtype=dtype))
    swapped = values.clone()
    swapped[[0, 1]] = values[[1, 0]]
    assert checksum(values) == checksum(values.t().contiguous().t())
    assert len({checksum(values), checksum(other), checksum(swapped)}) == 3


def test_a_byte_that_changes_on_the_way_changes_one_checksum(tmp_path):
    spec = spec_of(CASES[0], tmp_path)
    staged = sender_of(spec, 0).stage_bucket(1, checksums=True)
    (handle,) = staged.handles.values()
    with open(handle.path, "r+b") as file:
        file.seek(5)
        file.write(b"\x99")
    receiver = WeightReceiver(spec, 0, "cpu")
    list(receiver.receive(1, staged.handles, checksums=True))
    assert receiver.checksums.keys() == staged.checksums.keys()
    differing = [name for (name, *_), value in receiver.checksums.items() if value not in staged.checksums.values()]
    assert differing == ["model.layers.0.input_layernorm.weight"]


def test_too_little_shared_memory_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no memory for the engines' weights"):
        SharedMemory(tmp_path / "missing" / "parent").put("bucket", [torch.zeros(4)], torch.float32)
    assert not list(tmp_path.iterdir())
