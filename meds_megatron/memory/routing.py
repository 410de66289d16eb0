"""Which shard a key lives on."""

import hashlib


def shard_of(key: str, shards: int) -> int:
    """Index in [0, shards) of the shard that owns `key`: the same in every process, on every machine, in every run."""
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % shards
