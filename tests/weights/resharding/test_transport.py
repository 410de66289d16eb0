"""Weights from trainer ranks to engine ranks in processes of their own, through memory and over the network."""

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.trainer.weight_sync import compare
from meds_megatron.weights.resharding.boxes import checksum
from meds_megatron.weights.resharding.messages import SyncSpec
from meds_megatron.weights.resharding.plan import engine_box
from meds_megatron.weights.resharding.receiver import WeightReceiver
from meds_megatron.weights.resharding.sender import WeightSender
from meds_megatron.weights.resharding.transport.network import Link, Meeting, open_meeting
from meds_megatron.weights.resharding.transport.shared_memory import SharedMemory
from meds_megatron.weights.table import box_slices

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
    """The parameters of a trainer rank, cut from the Hugging Face tensors by the table."""
    plan, hf, place = spec.plan(), hf_tensors(spec), spec.layout.coordinates(rank)
    parameters = {}
    for group in plan.groups:
        for entry in plan.table.groups[group]:
            if plan.stage(group) == place.pipeline and not entry.copy:
                local = torch.full(entry.local_shape(spec.layout.tensor), torch.nan)
                for piece in entry.pieces(place.tensor, spec.layout.tensor):
                    local[piece.local_slices()] = hf[piece.hf_name][piece.hf_slices()]
                parameters[entry.name] = local
    return parameters


def sender_of(spec: SyncSpec, rank: int) -> WeightSender:
    place = spec.layout.coordinates(rank)
    return WeightSender(spec, rank, place.tensor, share(spec, rank), SharedMemory(spec.directory))


def wrong_tensors(spec: SyncSpec, engine_rank: int, received: dict[str, Tensor]) -> list[str]:
    """Names of tensors whose part for the engine rank is not bit for bit what the trainer has."""
    wrong = []
    for name, whole in hf_tensors(spec).items():
        box = engine_box(spec.shape, name, tuple(whole.shape), engine_rank, spec.engine_tensor)
        part = box_slices(box.start, box.size)
        same = torch.equal(received[name][part], whole[part].to(getattr(torch, spec.dtype)))
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
    receivers = [WeightReceiver(spec, rank, "cpu", SharedMemory(spec.directory)) for rank in range(spec.engine_tensor)]
    received: list[dict[str, Tensor]] = [{} for _ in receivers]
    compared = 0
    for group in plan.groups:
        near = [s for rank, s in enumerate(senders) if spec.layout.coordinates(rank).pipeline == plan.stage(group)]
        staged = [sender.stage(group, checksums=True) for sender in near]
        handles = {place: handle for part in staged for place, handle in part.handles.items()}
        sums = {key: value for part in staged for key, value in part.checksums.items()}
        for receiver, tensors in zip(receivers, received, strict=True):
            tensors |= dict(receiver.receive(group, handles, checksums=True))
            assert receiver.checksums.items() <= sums.items()
            compared += len(receiver.checksums)
        for sender in near:
            sender.release(group)
        assert not os.listdir(spec.directory)
    assert compared >= len(plan.table.hf_shapes) * len(receivers) - 1
    for rank, tensors in enumerate(received):
        assert wrong_tensors(spec, rank, tensors) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[1:])))
def test_sent_weights_arrive_bit_for_bit(case, tmp_path, ranks):
    spec = spec_of(case, tmp_path)
    meeting, store = open_meeting("127.0.0.1", spec.layout.ranks, spec.engine_tensor)
    answers = ranks.run(meeting.members, send_or_receive, spec, meeting)
    sums = {key: value for answer in answers[: meeting.senders] for key, value in answer.items()}
    for wrong, received_sums in answers[meeting.senders :]:
        assert wrong == []
        assert received_sums and received_sums.items() <= sums.items()
    del store


def send_or_receive(rank: int, spec: SyncSpec, meeting: Meeting):
    """A member of the meeting: a sender gives back its checksums, a receiver what came wrong and its checksums."""
    plan, link = spec.plan(), Link(meeting, rank, "cpu")
    if rank < meeting.senders:
        sender, sums = sender_of(spec, rank), {}
        sender.connect(0, link)
        for group in plan.groups:
            if spec.layout.coordinates(rank).pipeline == plan.stage(group):
                sums |= sender.send(group, engine=0, checksums=True)
        return sums
    members = {
        (place.pipeline, place.tensor): r for r in range(meeting.senders) for place in [spec.layout.coordinates(r)]
    }
    engine_rank = rank - meeting.senders
    receiver = WeightReceiver(spec, engine_rank, "cpu", SharedMemory(spec.directory), link, members)
    received, sums = {}, {}
    for group in plan.groups:
        received |= dict(receiver.receive(group, {}, checksums=True))
        sums |= receiver.checksums
    return wrong_tensors(spec, engine_rank, received), sums


def test_a_sender_hears_that_its_engine_is_gone(tmp_path, ranks):
    spec = spec_of(CASES[0], tmp_path)
    meeting, store = open_meeting("127.0.0.1", 1, 1)
    error, _ = ranks.run(2, send_to_one_who_leaves, spec, meeting)
    assert "ConnectionError" in error
    del store


def send_to_one_who_leaves(rank: int, spec: SyncSpec, meeting: Meeting) -> str:
    link = Link(meeting, rank, "cpu")
    if rank == 1:
        receiver = WeightReceiver(spec, 0, "cpu", SharedMemory(spec.directory), link, {(0, 0): 0})
        receiver.receive(0, {})
        return "gone"
    sender = sender_of(spec, 0)
    sender.connect(0, link)
    sender.send(0, engine=0, checksums=False)
    try:
        for group in spec.plan().groups[1:]:
            sender.send(group, engine=0, checksums=False)
    except ConnectionError as error:
        return f"ConnectionError: {error}"
    return "nothing noticed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksums_tell_bits_and_order(dtype):
    values = torch.randn(70_000, 20).to(dtype)
    other = values.clone()
    other[123, 4] = torch.nextafter(other[123, 4], torch.tensor(9.0, dtype=dtype))
    swapped = values.clone()
    swapped[[0, 1]] = values[[1, 0]]
    assert checksum(values) == checksum(values.t().contiguous().t())
    assert len({checksum(values), checksum(other), checksum(swapped)}) == 3


def test_a_byte_that_changes_on_the_way_is_named(tmp_path):
    spec = spec_of(CASES[0], tmp_path)
    staged = sender_of(spec, 0).stage(1, checksums=True)
    (handle,) = staged.handles.values()
    with open(handle.path, "r+b") as file:
        file.seek(5)
        file.write(b"\x99")
    receiver = WeightReceiver(spec, 0, "cpu", SharedMemory(spec.directory))
    list(receiver.receive(1, staged.handles, checksums=True))
    with pytest.raises(UserError, match=r"received other values of model.layers.0.input_layernorm.weight"):
        compare(staged.checksums, receiver.checksums, engine=0)


def test_shared_memory_that_cannot_be_had_is_told_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no room for the engines' weights"):
        SharedMemory(tmp_path / "missing" / "parent").put("group", [torch.zeros(4)], torch.float32)
    assert not list(tmp_path.iterdir())
