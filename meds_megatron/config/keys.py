"""The dotted keys of the schema and their types, and the sentences that explain a wrong one."""

import difflib
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from meds_megatron.config.schema import Config


@cache
def schema_types() -> dict[str, Any]:
    """Every dotted key, sections included, with its annotated type; declaration order."""
    return dict(_walk(Config, ""))


def _walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, annotation in get_type_hints(section).items():
        key = prefix + name
        yield key, annotation
        if is_dataclass(annotation):
            yield from _walk(annotation, key + ".")


def is_section(key: str) -> bool:
    """Whether the known `key` holds further keys."""
    return is_dataclass(schema_types()[key])


def literal_values(key: str) -> tuple[str, ...]:
    """The values a `Literal` key allows; empty for every other key."""
    annotation = schema_types()[key]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def nearest_key(key: str) -> str | None:
    """The known key that `key` most likely means: the same last name elsewhere, or the closest spelling."""
    known = list(schema_types())
    name = key.rpartition(".")[2]
    namesakes = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    close = difflib.get_close_matches(key, namesakes or known, n=1, cutoff=0.0 if namesakes else 0.6)
    return close[0] if close else None


def describe_type(annotation: Any) -> str:
    """The type in a user's words, for "expected ..." in an error."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin in (Union, UnionType):
        return " or ".join(describe_type(argument) for argument in arguments)
    if origin is list:
        return f"a list, each item {describe_type(arguments[0])}"
    if is_dataclass(annotation):
        return "a section with the keys " + ", ".join(get_type_hints(annotation))
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
    return words[annotation]
