"""Reading and writing configs: YAML files with `base:` inheritance, then dotted overrides, into a plain `Config`."""

import copy
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from meds_megatron import atomic
from meds_megatron.config.schema import Config
from meds_megatron.errors import UserError
from meds_megatron.user_functions import is_function

BASE_KEY = "base"
TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The schema's defaults, overridden by a YAML file and then by `key=value` overrides.

    `base: other.yaml` in a file (relative to that file) is applied before the file itself; the override
    `base=other.yaml` (relative to the working directory) replaces the `base` of the first file. Values may refer to
    others as `${section.name}`. Raises UserError for a missing or malformed file, an unknown key and a value of a wrong
    type.
    """
    settings = copy.deepcopy(_defaults())
    sources: dict[str, str] = {}
    bases = [override for override in overrides if override.startswith(f"{BASE_KEY}=")]
    layers = _file_layers(Path(path), (), base=Path(bases[-1].partition("=")[2]) if bases else None)
    layers += [_override_layer(override) for override in overrides if override not in bases]
    for source, values in layers:
        for key, value in _leaves(values, "", source):
            _set(settings, key, value, source)
            sources[key] = source
    try:
        config = OmegaConf.to_object(settings)
        assert isinstance(config, Config)
        return config
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UserError(f"{sources.get(key, path)}: {key} cannot be resolved: {_first_line(error)}.") from error


def save_config(config: Config, path: str | Path) -> None:
    """Write every setting of `config` as YAML that `load_config` reads back. Replaces the file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


@cache
def _defaults() -> DictConfig:
    """The schema with its default values; a copy of it takes a quarter of the time that making it takes."""
    return OmegaConf.structured(Config)


def _file_layers(path: Path, above: tuple[Path, ...], base: Path | None = None) -> list[tuple[str, dict]]:
    """(source, values) of the file and of its bases, the deepest base first.

    `above` are the files that inherit from this one; `base` overrides the file's own base.
    """
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(map(str, (*above, resolved)))
        raise UserError(f"{above[-1]}: `{BASE_KEY}` is circular ({chain}); remove one of these lines.")
    values = _read_yaml(path, above)
    own_base = values.pop(BASE_KEY, None)
    if not isinstance(own_base, str | None):
        raise UserError(f"{path}: `{BASE_KEY}` is {own_base!r}, expected the path of one YAML file, relative to it.")
    if base is None and own_base is not None:
        base = path.parent / own_base
    deeper = _file_layers(base, (*above, resolved)) if base else []
    return [*deeper, (str(path), values)]


def _read_yaml(path: Path, above: tuple[Path, ...]) -> dict:
    if not path.is_file():
        named_by = f", named as `{BASE_KEY}` in {above[-1]}" if above else ""
        raise UserError(f"{path}: there is no such config file{named_by}; give the path of a YAML file.")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise UserError(f"{path}{line}: not readable as YAML: {problem}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top level, found a {type(values).__name__}.")
    return values


def _override_layer(override: str) -> tuple[str, dict]:
    source = f"override `{override}`"
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"{source}: expected key=value, such as penalty.alpha=0.02.")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        assert isinstance(values, dict)
        return source, values
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{source}: the value is not readable as YAML; quote it.") from error


def _leaves(values: dict, prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting in nested `values`; UserError for a key that is not in the schema."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in schema_types():
            nearest = nearest_key(key)
            hint = f"did you mean `{nearest}`?" if nearest else "see meds_megatron/config/schema.py for all keys."
            raise UserError(f"{source}: unknown key `{key}`; {hint}")
        if not is_dataclass(schema_types()[key]):
            yield key, value
        elif isinstance(value, dict):
            yield from _leaves(value, key + ".", source)
        elif value is not None:
            raise _wrong_type(source, key, value)


def _set(settings: DictConfig, key: str, value: Any, source: str) -> None:
    expected = schema_types()[key]
    if value is False and get_origin(expected) is Literal and "no" in get_args(expected):
        value = "no"  # YAML reads a bare `no` as false.
    lossy = expected is bool and isinstance(value, int | float) and not isinstance(value, bool)
    nested = isinstance(value, list) and any(isinstance(item, list | dict) for item in value)
    choices = schema_choices().get(key)
    unknown = choices and not (value in choices or (isinstance(value, str) and is_function(value)))
    try:
        if lossy or nested or unknown:
            raise ValueError(value)
        OmegaConf.update(settings, key, value)
    except (ValueError, OmegaConfBaseException) as error:
        raise _wrong_type(source, key, value) from error


def _wrong_type(source: str, key: str, value: Any) -> UserError:
    if choices := schema_choices().get(key):
        expected = f"one of {', '.join(choices)}, or a function of yours as file.py:name or module:name"
    else:
        expected = _describe(schema_types()[key])
    return UserError(f"{source}: {key} is {value!r}, expected {expected}.")


def _describe(annotation: Any) -> str:
    """The type in words, for "expected ..." in an error."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, arguments))
    if origin is list:
        return f"a list, each item {_describe(arguments[0])}"
    if is_dataclass(annotation):
        return "a section with the keys " + ", ".join(get_type_hints(annotation))
    return TYPE_NAMES[annotation]


@cache
def schema_choices() -> dict[str, tuple[str, ...]]:
    """Names that a key may have besides functions of the user's own, for the keys made with `choice`."""

    def walk(section: Any, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for key in fields(section):
            if isinstance(key.type, type) and is_dataclass(key.type):
                yield from walk(key.type, f"{prefix}{key.name}.")
            elif "choices" in key.metadata:
                yield prefix + key.name, key.metadata["choices"]

    return dict(walk(Config, ""))


@cache
def schema_types() -> dict[str, Any]:
    """Every dotted key, sections included, with its annotated type; in the order of declaration."""
    return dict(_walk(Config, ""))


def _walk(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, annotation in get_type_hints(section).items():
        yield prefix + name, annotation
        if isinstance(annotation, type) and is_dataclass(annotation):
            yield from _walk(annotation, f"{prefix}{name}.")


def nearest_key(key: str) -> str | None:
    """The known key most similar to `key`: one with the same last name in another section, or the closest spelling."""
    known = list(schema_types())
    name = key.rpartition(".")[2]
    namesakes = [candidate for candidate in known if candidate.rpartition(".")[2] == name]
    close = difflib.get_close_matches(key, namesakes or known, n=1, cutoff=0.0 if namesakes else 0.6)
    return close[0] if close else None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
