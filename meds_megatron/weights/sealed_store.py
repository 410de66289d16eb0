"""A torch store whose values only those can write and read who know its secret."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from meds_megatron.errors import UserError
from meds_megatron.weights.store_address import StoreAddress

SECRET_BYTES = 32
_NONCE_BYTES = 12


class SealedStore(dist.Store):
    """Values are encrypted and authenticated together with their keys (AES-256-GCM); `get` refuses any other.

    A TCPStore accepts everyone who reaches its port, and lists its keys and values to them. Behind this class a
    stranger sees names of keys, and can delete or overwrite what then nobody accepts. Counters (`add`) are the server's
    and not authenticated: torch's groups do not use them.

    torch keeps only the C++ part of a store: whoever makes groups with it must keep this object as long as they live.
    """

    def __init__(self, inner: dist.Store, address: StoreAddress) -> None:
        super().__init__()
        self.address = address
        self._inner: Any = inner
        self._cipher = AESGCM(address.secret)
        self._clones: list[SealedStore] = []

    def set(self, key: str, value: str | bytes) -> None:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._inner.set(key, nonce + self._cipher.encrypt(nonce, content, key.encode()))

    def get(self, key: str) -> bytes:
        """Raises UserError for a value that was not written with the secret, or under another key."""
        sealed = self._inner.get(key)
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], key.encode())
        except (InvalidTag, ValueError):
            raise UserError(
                f"a process that does not have the run's secret wrote {key} into the store of a process group: keep "
                "the nodes' ports in a private network, and start again"
            ) from None

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._inner.wait(list(keys), *([] if timeout is None else [timeout]))

    def check(self, keys: Sequence[str]) -> bool:
        return self._inner.check(list(keys))

    def add(self, key: str, amount: int) -> int:
        return self._inner.add(key, amount)

    def delete_key(self, key: str) -> bool:
        return self._inner.delete_key(key)

    def num_keys(self) -> int:
        return self._inner.num_keys()

    # The names under which torch's C++ code looks for these two.
    deleteKey = delete_key
    getNumKeys = num_keys

    def has_extended_api(self) -> bool:
        return False

    def clone(self) -> "SealedStore":
        self._clones.append(SealedStore(self._inner.clone(), self.address))
        return self._clones[-1]

    def proof(self, message: bytes) -> bytes:
        """HMAC of `message`, 32 bytes, which only those who know the secret can compute."""
        return hmac.digest(self.address.secret, message, hashlib.sha256)
