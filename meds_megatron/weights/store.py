"""The stores through which processes form groups."""

import socket

import torch.distributed as dist


def open_store(host: str, members: int) -> dist.TCPStore:
    """A store for `members` processes at this machine's address `host`, and at no other of its addresses, on a port
    that the system picks. It has no password: who reaches the port can disturb the run, but run nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, backlog=max(128, members))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        host, port, members, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
    )
