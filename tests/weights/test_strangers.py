"""Processes without a run's secret: none becomes a member of a process group, and what one sends is not run."""

import multiprocessing
import subprocess
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from meds_megatron.actor.process_group import join
from meds_megatron.errors import UserError
from meds_megatron.weights.collective import gather_texts, on_all_ranks
from meds_megatron.weights.sealed_store import SealedStore
from meds_megatron.weights.store import connect, open_store
from meds_megatron.weights.store_address import StoreAddress
from tests.limits import HANG_SECONDS

LIMIT = timedelta(seconds=10)
ENDED_SECONDS = HANG_SECONDS


class Evil:
    """A pickle that runs a program where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return subprocess.call, (["touch", str(self.marker)],)


def raw_store(address: StoreAddress) -> dist.TCPStore:
    """Store of a stranger who knows the port."""
    return dist.TCPStore(address.host, address.port, 2, is_master=False)


def send_evil(store: dist.Store, marker: Path) -> None:
    dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=LIMIT)
    dist.all_gather_object([None, None], Evil(marker))


def who_knows_the_port(address: StoreAddress, marker: Path) -> None:
    send_evil(raw_store(address), marker)


def who_copies_the_first_member(address: StoreAddress, marker: Path) -> None:
    store = raw_store(address)
    store.set("present1", store.get("present0"))
    send_evil(store, marker)


class SeesTheStore(SealedStore):
    """In the place of a stranger who was the first to connect to a member's gloo socket: no store keeps him out."""

    def proof(self, message: bytes) -> bytes:
        return bytes(32)


def members_store(address: StoreAddress) -> SealedStore:
    store = SeesTheStore(raw_store(address), address)
    store.set("present1", b"")
    return store


def who_is_in_a_socket(address: StoreAddress, marker: Path) -> None:
    send_evil(members_store(address), marker)


def who_is_in_a_socket_and_silent(address: StoreAddress, marker: Path) -> None:
    dist.init_process_group("gloo", store=members_store(address), rank=1, world_size=2, timeout=LIMIT)
    multiprocessing.Event().wait(ENDED_SECONDS)


def who_is_in_a_socket_and_answers(address: StoreAddress, marker: Path) -> None:
    with pytest.raises(UserError):
        join(address, 1, 2, store=members_store(address))
    dist.all_gather_object([None, None], Evil(marker))


def be_first_member(pipe: Connection) -> None:
    store = open_store("127.0.0.1", 2)
    pipe.send(store.address)
    pipe.recv()
    try:
        join(store.address, 0, 2, store=store, limit=LIMIT)
        on_all_ranks(lambda: None, "saving")
        dist.all_gather_object([None, None], None)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
    else:
        pipe.send("joined")


def be_second_member(address: StoreAddress, marker: Path) -> None:
    join(address, 1, 2)
    on_all_ranks(lambda: None, "saving")
    dist.all_gather_object([None, None], Evil(marker))


def first_members_end(other: object, marker: Path) -> str:
    """Outcome of the first of two members when `other` is the second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["meds_megatron.actor.policy"])
    pipe, theirs = context.Pipe()
    first = context.Process(target=be_first_member, args=(theirs,), daemon=True)
    first.start()
    theirs.close()
    second = context.Process(target=other, args=(pipe.recv(), marker), daemon=True)
    second.start()
    pipe.send("go")
    try:
        assert pipe.poll(ENDED_SECONDS), "the first member neither joined nor failed"
        return pipe.recv()
    finally:
        for process in (first, second):
            process.kill()
            process.join()


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("stranger", "sentence"),
    [
        (who_knows_the_port, "UserError: of 2 members of a process group, 1 did not connect within 10 s"),
        (who_copies_the_first_member, "UserError: a process that does not have the run's secret wrote present1"),
        (who_is_in_a_socket, "UserError: a process group is not used, since its members did not answer a challenge"),
        (who_is_in_a_socket_and_silent, "UserError: a process group is not used, since its members did not answer"),
        (who_is_in_a_socket_and_answers, "UserError: a process group is not used, since member 1 does not have"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_stranger_is_no_member_and_nothing_of_his_is_run(stranger, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    end = first_members_end(stranger, tmp_path / "ran")
    assert end.startswith(sentence)
    assert "\n" not in end
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("processes")
def test_the_same_program_of_a_member_is_run(tmp_path, monkeypatch):
    """The strangers' program would be: torch reads objects of a group's members as pickles."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert first_members_end(be_second_member, tmp_path / "ran") == "joined"
    assert (tmp_path / "ran").exists()


def test_a_stranger_sees_keys_and_no_values():
    store = open_store("127.0.0.1", 2)
    store.set("key", b"the number that NCCL asks for")
    stranger = raw_store(store.address)
    assert "key" in stranger.list_keys()
    assert b"NCCL" not in stranger.get("key")
    assert connect(store.address, 2).get("key") == b"the number that NCCL asks for"
    assert connect(store.address, 2).clone().multi_get(["key"]) == [b"the number that NCCL asks for"]
    assert repr(store.address.secret) not in repr(store.address)


@pytest.mark.parametrize("value", [b"", b"x", bytes(range(40))])
def test_a_value_of_a_stranger_is_refused(value):
    store = open_store("127.0.0.1", 2)
    raw_store(store.address).set("key", value)
    with pytest.raises(UserError, match="does not have the run's secret wrote key"):
        store.get("key")


def test_a_value_under_another_key_or_of_another_run_is_refused():
    store, other = open_store("127.0.0.1", 2), open_store("127.0.0.1", 2)
    other.set("key", b"value")
    stranger = raw_store(store.address)
    stranger.set("key", raw_store(other.address).get("key"))
    store.set("first", b"value")
    stranger.set("second", stranger.get("first"))
    for key in ("key", "second"):
        with pytest.raises(UserError, match="does not have the run's secret"):
            store.get(key)


TEXTS = [None, "", "Größe 3 µm: ∞", "x" * 5000]


def texts_of_all(rank: int) -> list[str | None]:
    return gather_texts(TEXTS[rank])


def test_texts_are_gathered_without_pickles(ranks):
    assert ranks.run(4, texts_of_all) == [[None, "", "Größe 3 µm: ∞", "x" * 4096]] * 4


def no_texts(rank: int) -> list[str | None]:
    return gather_texts(None)


def test_no_text_is_gathered_where_no_rank_has_one(ranks):
    assert ranks.run(2, no_texts) == [[None, None]] * 2
