"""The stores through which processes form groups."""

import secrets
import socket
from datetime import timedelta

import torch.distributed as dist

from meds_megatron.errors import UserError
from meds_megatron.weights.sealed_store import SECRET_BYTES, SealedStore
from meds_megatron.weights.store_address import StoreAddress

JOIN_LIMIT = timedelta(minutes=5)
"""Time for all members of a group to connect and to prove that they are members."""


def open_store(host: str, members: int) -> SealedStore:
    """A store for `members` processes at this machine's address `host`, and at no other of its addresses, on a port
    that the system picks, with a new secret. It exists as long as it is kept.

    Who reaches the port without the secret can keep a group from forming, but is no member of it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, backlog=max(128, members))
    address = StoreAddress(host, listening.getsockname()[1], secrets.token_bytes(SECRET_BYTES))
    store = dist.TCPStore(
        host, address.port, members, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
    return SealedStore(store, address)


def connect(address: StoreAddress, members: int) -> SealedStore:
    """The store of another process. Raises RuntimeError when nobody listens there."""
    return SealedStore(dist.TCPStore(address.host, address.port, members, is_master=False), address)


def wait_for_members(store: SealedStore, member: int, members: int, limit: timedelta = JOIN_LIMIT) -> None:
    """Returns when all members have connected with the secret; groups themselves would wait for longer, or without end.

    Raises UserError when one does not within `limit`, or when a stranger stands in for it.
    """
    store.set(_present(member), b"")
    everyone = [_present(other) for other in range(members)]
    try:
        store.wait(everyone, limit)
    except dist.DistStoreError:
        missing = [number for number, key in enumerate(everyone) if not store.check([key])]
        raise UserError(
            f"of {members} members of a process group, {', '.join(map(str, missing))} did not connect within "
            f"{limit.total_seconds():.0f} s: see their logs, or set cluster.interface"
        ) from None
    store.multi_get(everyone)


def _present(member: int) -> str:
    return f"present{member}"
