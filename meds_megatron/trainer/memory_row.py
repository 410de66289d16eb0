"""What the driver holds of a response's fingerprint: never the numbers, only where they are."""

from dataclasses import dataclass

from ray import ObjectRef

UNBOXED = "|no_answer"
"""End of the keys of answers without a fingerprint."""


@dataclass(frozen=True)
class MemoryRow:
    """A response that the memory is asked about: its number in the step, its key, and the shard that owns the key."""

    number: int
    key: str
    shard: int


@dataclass(frozen=True)
class StoredFingerprint:
    """A row of an array that the rank which made it has put into the object store."""

    array: ObjectRef
    row: int
