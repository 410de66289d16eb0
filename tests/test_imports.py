"""Import graph of `meds_megatron`, lazy and type-checking imports included, and its declared dependencies."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.limits import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "meds_megatron"
PACKAGES = {path.parent.name for path in SOURCE.glob("*/__init__.py")}

SHARED = {
    "atomic",
    "digests",
    "errors",
    "json_text",
    "latex",
    "lean_imports",
    "logs",
    "processes",
    "shared_memory",
    "user_functions",
}
"""Top-level modules that every package may import."""
ALLOWED = {
    "config": set(),
    "data": {"config"},
    "reward": {"config"},
    "memory": {"config"},
    "algorithm": {"config"},
    "weights": {"config"},
    "model": {"config", "weights"},
    "run": {"config"},
    "cluster": {"config"},
    "faults": {"config"},
    "sweeps": {"config", "run", "cluster"},
    "rollout": {"config", "weights", "reward", "data", "cluster", "faults"},
    "actor": {"config", "weights", "model", "algorithm", "cluster", "faults"},
    "toy_tasks": {"config", "data", "model"},
    # Reads the conversion table's shapes and the resharding plan, both pure Python, and where ranks and engines go.
    "plan": {"config", "weights", "cluster", "run"},
    # Clusters the fingerprints of a whole run as the memory does, and answers in any spelling as the grader does.
    "report": {"config", "memory", "reward", "run"},
    "evaluation": {
        *("config", "data", "reward", "rollout", "cluster", "faults", "toy_tasks", "weights", "actor", "run"),
    },
    "preflight": {"config", "cluster", "weights", "model", "actor"},
    "trainer": PACKAGES - {"bench", "commands", "preflight", "sweeps"},
    "bench": PACKAGES - {"commands"},
    "commands": PACKAGES,
    **{module: set() for module in SHARED},
    "cli": PACKAGES,
}
"""Packages and top-level modules, and the packages that each may import."""

CLUSTER = ("megatron", "ray", "vllm")
CLUSTERING = ("hdbscan", "numba", "sklearn", "scipy")
NOT_LOADED = {
    "config": (*CLUSTER, "torch"),
    "config.layout": (*CLUSTER, "torch"),
    "config.model_shape": (*CLUSTER, "torch"),
    "data.sampler": (*CLUSTER, "torch"),
    "memory": (*CLUSTER, "torch", "hdbscan", "sklearn"),
    "report": (*CLUSTER, "torch", "hdbscan", "sklearn"),
    # The driver imports it before anything is started.
    "trainer": ("megatron", "vllm", "transformers", "wandb", *CLUSTERING),
    "run": ("megatron", "torch", "vllm", "transformers", "wandb", *CLUSTERING),
    "faults": ("megatron", "torch", "vllm", "transformers", *CLUSTERING),
    "cluster": ("megatron", "torch", "vllm"),
    "sweeps": ("megatron", "torch", "vllm"),
    "plan": (*CLUSTER, "torch"),
    "algorithm": CLUSTER,
    "weights.resharding.plan": CLUSTER,
    "actor.schedule": CLUSTER,
    "actor.train_batch": CLUSTER,
}
"""Modules (for a package: all of its modules), and what importing them must not load."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full name of every module that the file imports, and `module.name` of every name, anywhere in the file."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, dict[str, set[str]]]:
    """Imports of each package and top-level module: those it imports, with the files that import them."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "__init__.py":
            continue
        own = module_name(path).split(".")[1]
        edges = found.setdefault(own, {})
        for name in imports(path):
            parts = name.split(".")
            is_ours = parts[0] == "meds_megatron" and len(parts) > 1
            if is_ours and parts[1] != own and (parts[1] in PACKAGES or (SOURCE / f"{parts[1]}.py").exists()):
                edges.setdefault(parts[1], set()).add(str(path.relative_to(SOURCE)))
    return found


def test_the_table_names_every_package_and_top_level_module():
    modules = {path.stem for path in SOURCE.glob("*.py")} - {"__init__"}
    assert PACKAGES | modules <= set(ALLOWED)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_the_packages_it_may(package):
    forbidden = set(graph().get(package, {})) - ALLOWED[package] - SHARED
    assert {name: sorted(graph()[package][name]) for name in forbidden} == {}


def test_no_packages_import_each_other_in_a_cycle():
    try:
        ordered = set(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"import each other: {' -> '.join(error.args[1])}")
    assert ordered == set(graph())


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("module", NOT_LOADED)
def test_importing_loads_no_heavy_package(module):
    path = SOURCE.joinpath(*module.split("."))
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    program = f"""
import importlib, sys
for name in {[module_name(file) for file in files]}:
    importlib.import_module(name)
loaded = set({NOT_LOADED[module]}) & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> dict[str, set[str]]:
    """Distributions that pyproject.toml requires, by the name of the extra; "" is what a plain install gets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        group: {normalised(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}
        for group, requirements in groups.items()
    }


def imported(directory: Path) -> set[str]:
    """Installed distributions that the files of a directory import."""
    roots = {name.split(".")[0] for path in directory.rglob("*.py") for name in imports(path)}
    distributions = packages_distributions()
    own = {"meds_megatron", "tests", *(path.stem for path in (ROOT / "tools").rglob("*.py"))}
    third_party = roots - set(sys.stdlib_module_names) - own
    return {normalised(distributions.get(root, [root])[0]) for root in third_party}


def test_every_import_is_declared_and_every_declared_dependency_imported():
    groups = declared()
    run = groups[""] | groups["cpu"] | groups["cuda-local"]
    assert imported(SOURCE) - run == set()
    assert groups[""] - imported(SOURCE) == set()
    assert imported(ROOT / "tests") - run - groups["dev"] == set()
