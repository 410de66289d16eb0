"""Functions of the user's own, which a config names as `path/to/file.py:name` or `package.module:name`."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from meds_megatron.digests import file_digest
from meds_megatron.errors import UserError


def is_function(value: str) -> bool:
    """Whether the value of a setting names a function, in contrast to one of the setting's own choices."""
    return ":" in value


def absolute(value: str) -> str:
    """The same function by the absolute path of its file: processes on other nodes have other working directories."""
    source, _, name = value.rpartition(":")
    return f"{os.path.abspath(Path(source).expanduser())}:{name}" if source.endswith(".py") else value


@cache
def load_function(key: str, value: str) -> Callable[..., Any]:
    """The function that the setting `key` names. Its module is executed once a process. Raises UserError where there is
    none."""
    source, _, name = value.rpartition(":")
    function = getattr(_module(key, source), name, None)
    if not callable(function):
        found = "has no such name" if function is None else f"has a {type(function).__name__} of that name"
        raise UserError(f"{key} is {value}, but {source} {found}: name a function there, as file.py:name")
    return function


def source_digest(key: str, value: str) -> str:
    """Digest of the file that defines the function (`digests.file_digest`)."""
    file = _module(key, value.rpartition(":")[0]).__file__
    assert file is not None
    return file_digest(Path(file))


def _module(key: str, source: str) -> ModuleType:
    file = Path(source).expanduser() if source.endswith(".py") else None
    if file is not None and not file.is_file():
        raise UserError(f"{key}: {source} does not exist; name the file of your function, as file.py:name")
    try:
        return import_module(source) if file is None else _module_of_file(file.resolve())
    except Exception as error:
        raise UserError(
            f"{key}: {source} cannot be imported ({type(error).__name__}: {error}); correct it, and try it in Python"
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    # Distinct for files of one name; pickle finds classes of the module by it.
    name = f"meds_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
