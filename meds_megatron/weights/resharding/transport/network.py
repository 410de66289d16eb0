"""Weights over the network: a process group of an engine's ranks and the trainer ranks that serve it from elsewhere.

gloo between CPUs, NCCL between GPUs. The group is made beside torch's default one, which vLLM and Megatron have for
themselves, and every engine has its own: one that dies breaks no other's. With gloo a member notices that another is
gone; NCCL tells it late or not at all, and has not been tried.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)
"""For members to come, and for one message."""


@dataclass(frozen=True)
class Meeting:
    """Where the members of a link meet."""

    host: str
    port: int
    senders: int
    """Trainer ranks; they come first in the group."""
    receivers: int
    """Engine ranks."""

    @property
    def members(self) -> int:
        return self.senders + self.receivers


def open_meeting(host: str, senders: int, receivers: int) -> tuple[Meeting, dist.TCPStore]:
    """A new meeting at a free port of this machine; it lasts as long as the store is kept."""
    store = dist.TCPStore(host, 0, senders + receivers, is_master=True, wait_for_workers=False)
    return Meeting(host, store.port, senders, receivers), store


class Link:
    """This process's end of a link."""

    def __init__(self, meeting: Meeting, member: int, device: str, store: dist.TCPStore | None = None):
        """Meets the others. `store` is that of the member that opened the meeting.

        Raises ConnectionError when they do not come.
        """
        try:
            store = store or dist.TCPStore(meeting.host, meeting.port, meeting.members, is_master=False)
            self._group = _process_group(store, member, meeting.members, device)
        except RuntimeError as error:
            raise ConnectionError(f"not all members of a weight link came: {error}") from error
        self._store = store
        self._senders = meeting.senders

    def receiver(self, engine_rank: int) -> int:
        """The member that an engine rank is."""
        return self._senders + engine_rank

    def send(self, values: Tensor, member: int) -> None:
        """Returns when the values are out of this process's hands. Raises ConnectionError when the member is gone."""
        values = values.contiguous()
        try:
            self._group.send([values], member, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(f"member {member} of a weight link is gone: {error}") from error

    def receive(self, place: Tensor, member: int) -> None:
        """Fills `place`, which must be contiguous. Raises ConnectionError when the member is gone."""
        try:
            self._group.recv([place], member, 0).wait()
        except RuntimeError as error:
            raise ConnectionError(f"member {member} of a weight link is gone: {error}") from error


def _process_group(store: dist.TCPStore, member: int, members: int, device: str) -> dist.ProcessGroup:
    if device == "cpu":
        return dist.ProcessGroupGloo(store, member, members, TIMEOUT)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return dist.ProcessGroupNCCL(store, member, members, options)
