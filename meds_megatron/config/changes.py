"""Settings that may differ when a run resumes, and those that make it another run."""

from collections.abc import Container, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from meds_megatron.config.schema import Config


def changes(saved: Config, present: Config) -> tuple[list[str], list[str]]:
    """`key: old -> new` of every setting that differs: those free to change, and those that make it another run."""
    old, new = settings_of(saved), settings_of(present)
    free: list[str] = []
    other: list[str] = []
    for key, value in new.items():
        if old[key] != value:
            kind = free if is_free_to_change(key) else other
            kind.append(f"{key}: {old[key]} -> {value}")
    return free, other


def make_another_run(saved: Config, planned: Config, also: Container[str] = ()) -> list[str]:
    """`key: old -> new` of the settings that make a config another run than the saved one, and of the keys `also`. A
    setting that the config leaves open (`auto`) is as the run has chosen it."""
    old = settings_of(saved)
    return [
        f"{key}: {old[key]} -> {value}"
        for key, value in settings_of(planned).items()
        if value not in (old[key], "auto") and (key in also or not is_free_to_change(key))
    ]


def settings_of(config: Config) -> dict[str, Any]:
    """The value of every setting by its dotted key."""
    return dict(_leaves(config))


def is_free_to_change(key: str) -> bool:
    """Whether a resumed run may have another value of the key: it, or a section that it is in, is `resumable`."""
    section: Any = Config
    for name in key.split("."):
        field = next(field for field in fields(section) if field.name == name)
        if field.metadata.get("resumable"):
            return True
        section = field.type
    return False


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
