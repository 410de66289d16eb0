"""Weights over the network: a process group of an engine's ranks and the trainer ranks that serve it from elsewhere.

NCCL between GPUs, gloo between CPUs. The group is made beside torch's default one, which vLLM and Megatron have for
themselves, and every engine has its own: one that dies breaks no other's.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Meeting:
    """Where the members of a link meet."""

    host: str
    port: int
    senders: int
    """Trainer ranks; they come first in the group."""
    receivers: int
    """Engine ranks."""
    timeout_minutes: int

    @property
    def members(self) -> int:
        return self.senders + self.receivers


def open_meeting(host: str, senders: int, receivers: int, timeout_minutes: int) -> tuple[Meeting, dist.TCPStore]:
    """A new meeting at a free port of this machine; it lasts as long as the store is kept."""
    store = dist.TCPStore(host, 0, senders + receivers, is_master=True, wait_for_workers=False)
    return Meeting(host, store.port, senders, receivers, timeout_minutes), store


class Link:
    """This process's end of a link."""

    def __init__(self, meeting: Meeting, member: int, device: str, store: dist.TCPStore | None = None):
        """Returns when all members have come. `store` is that of the member that opened the meeting."""
        store = store or dist.TCPStore(meeting.host, meeting.port, meeting.members, is_master=False)
        timeout = timedelta(minutes=meeting.timeout_minutes)
        if device == "cpu":
            self._group = dist.ProcessGroupGloo(store, member, meeting.members, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, member, meeting.members, options)
        self._store = store
        self._senders = meeting.senders

    def receiver(self, engine_rank: int) -> int:
        """The member that an engine rank is."""
        return self._senders + engine_rank

    def send(self, values: Tensor, member: int) -> None:
        """Returns when the values are out of this process's hands. Raises RuntimeError when the member is gone."""
        self._group.send([values.contiguous()], member, 0).wait()

    def receive(self, place: Tensor, member: int) -> None:
        """Fills `place`, which must be contiguous. Raises RuntimeError when the member is gone."""
        self._group.recv([place], member, 0).wait()
