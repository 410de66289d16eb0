"""The address of a store. Imports no torch: the driver passes it on."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoreAddress:
    """Address and secret that a process needs to be a member of a store's groups.

    It travels through Ray, whose token keeps strangers out, or through the pipe of a child process.
    """

    host: str
    port: int
    secret: bytes = field(repr=False)
