"""Tiers of tests by what they start, which their fixtures show: `--fast` runs the first, `--full` every case of all.

A test of the tier `unit` that starts a process fails and names the fixture that it lacks.
"""

import ast
import multiprocessing.process
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

TIERS = {
    "unit": "starts no process",
    "process": "starts processes of its own: graders, Ray actors, commands that train nothing",
    "ranks": "forms process groups of trainer ranks",
    "engine": "starts vLLM engines",
    "run": "starts whole runs or evaluations",
    "browser": "opens pages in a browser",
    "slurm": "starts a Slurm of two nodes",
}
"""Tiers in the order in which they run; a test that takes fixtures of several is of the last of them."""
FIXTURES = {
    "processes": "process",
    "shared_ray": "process",
    "own_ray": "process",
    "ranks": "ranks",
    "cpu_ranks": "ranks",
    "cpu_engines": "engine",
    "engine_device": "engine",
    "run_meds": "run",
    "browser": "browser",
    "slurm": "slurm",
}
FULL = pytest.mark.full
"""Marks a case that only `--full` runs: its factors are those of other cases, in another combination."""
EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
"""Audit events of Python that come before a process is started."""


class ProcessGuard:
    """Raises in a test of the tier `unit` that is about to start a process."""

    def __init__(self) -> None:
        self.test: str | None = None
        sys.addaudithook(self._refuse)
        start = multiprocessing.process.BaseProcess.start

        def guarded_start(process: multiprocessing.process.BaseProcess) -> None:
            self._refuse("multiprocessing", ())
            start(process)

        # multiprocessing raises no audit event.
        multiprocessing.process.BaseProcess.start = guarded_start

    def _refuse(self, event: str, arguments: tuple) -> None:
        if self.test and event in (*EVENTS, "multiprocessing"):
            raise AssertionError(f"{self.test} starts a process ({event}): let it take the fixture `processes`")


def tier_of(fixtures: Iterable[str]) -> str:
    """Tier of a test that takes `fixtures`, those which its fixtures take included."""
    order = list(TIERS)
    return max((FIXTURES.get(name, "unit") for name in fixtures), key=order.index, default="unit")


def may_be_fast(file: Path) -> bool:
    """Whether a file of tests may have some of the tier `unit`, by its text: others need not be imported for `--fast`.

    Fixtures of conftest files count by their names in FIXTURES only, so the answer errs on the side of True.
    """
    tree = ast.parse(file.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    taken = {function.name: _requested(function) for function in functions}
    everywhere = _used(node for node in tree.body if isinstance(node, ast.Assign) and _is_pytestmark(node))

    @cache
    def starts_something(name: str) -> bool:
        return name in FIXTURES or any(map(starts_something, taken.get(name, set()) - {name}))

    tests = [function.name for function in functions if function.name.startswith("test_")]
    return not tests or not all(any(map(starts_something, taken[test] | everywhere)) for test in tests)


def _requested(function: ast.FunctionDef) -> set[str]:
    names = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    return names | _used(function.decorator_list)


def _used(nodes: Iterable[ast.AST]) -> set[str]:
    """Names in calls of `pytest.mark.usefixtures`."""
    calls = (node for root in nodes for node in ast.walk(root) if isinstance(node, ast.Call))
    marks = (call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "usefixtures")
    return {word.value for call in marks for word in call.args if isinstance(word, ast.Constant)}


def _is_pytestmark(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets)
