"""Proof that all members of a process group are processes of the run.

gloo's sockets accept whoever connects first and sends a small number, so a group that formed through a sealed store can
still have a stranger in a member's place. NCCL's sockets require a number that its members read from the store, where a
SealedStore keeps it from strangers.
"""

import hmac
import secrets
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from meds_megatron.errors import UserError
from meds_megatron.weights.sealed_store import SealedStore
from meds_megatron.weights.store import JOIN_LIMIT

_BYTES = 32


def check_members(group: Any, store: SealedStore, limit: timedelta = JOIN_LIMIT) -> None:
    """Challenges every member of a gloo group, by tensors alone; all members call it, and nothing else uses the group
    before. Raises UserError when one has no proof within `limit` that it knows the secret of `store`."""
    challenges = _gathered(group, secrets.token_bytes(_BYTES), limit)
    challenge = b"".join(challenges)
    proofs = _gathered(group, store.proof(challenge + _number(group.rank())), limit)
    for member, proof in enumerate(proofs):
        if not hmac.compare_digest(proof, store.proof(challenge + _number(member))):
            raise _refusal(f"member {member} does not have the run's secret")


def _gathered(group: Any, value: bytes, limit: timedelta) -> list[bytes]:
    parts: list[Tensor] = [torch.zeros(_BYTES, dtype=torch.uint8) for _ in range(group.size())]
    try:
        group.allgather([parts], [torch.frombuffer(bytearray(value), dtype=torch.uint8)]).wait(limit)
    except RuntimeError as error:
        raise _refusal(f"its members did not answer a challenge ({str(error).splitlines()[0]})") from error
    return [bytes(part.tolist()) for part in parts]


def _number(member: int) -> bytes:
    return member.to_bytes(8, "big")


def _refusal(reason: str) -> UserError:
    return UserError(
        f"a process group is not used, since {reason}: keep the nodes' ports in a private network, and start again"
    )
