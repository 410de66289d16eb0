"""Actors in this process: called as Ray's are, without Ray."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LocalReference:
    """Result of a method, as Ray's ObjectRef."""

    result: Future

    def future(self) -> Future:
        return self.result


@dataclass(frozen=True)
class LocalMethod:
    """A method of an actor, as Ray's ActorMethod."""

    call: Callable[..., Future]
    name: str

    def options(self, **_: Any) -> "LocalMethod":
        return self

    def remote(self, *arguments: Any) -> LocalReference:
        return LocalReference(self.call(self.name, *arguments))


@dataclass(frozen=True)
class LocalActor:
    """An actor whose methods are calls of one function, as Ray's ActorHandle."""

    call: Callable[..., Future]
    """Its arguments are the method's name and the method's arguments."""

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(self.call, name)
