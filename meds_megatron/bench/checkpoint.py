"""Cost of a checkpoint: the time that training waits for an asynchronous save and for a synchronous one."""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from meds_megatron.actor import optimizer, optimizer_state
from meds_megatron.actor.background_save import HostCopies
from meds_megatron.actor.checkpoint import PolicySave
from meds_megatron.actor.process_group import form_groups, join
from meds_megatron.actor.worker import rank_env_vars
from meds_megatron.bench.processes import placed_on
from meds_megatron.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from meds_megatron.config.model_shape import QWEN, ModelShape
from meds_megatron.digests import file_digest
from meds_megatron.model.gpt import build_chunks, transformer_config
from meds_megatron.weights.store import open_store
from meds_megatron.weights.store_address import StoreAddress

POLL_SECONDS = 0.05


def run(
    directory: str | None = None, pipeline: int = 2, rounds: int = 3, shape: ModelShape = QWEN["Qwen2.5-0.5B"]
) -> dict:
    """Saves model and optimizer of `pipeline` CPU ranks, random bfloat16 weights, both ways in turn into `directory`
    (default: the system's directory for temporary files).

    Keys: `bytes` of a checkpoint; `synchronous_s`, until all is on disk; `critical_s`, which an asynchronous save takes
    from training: planning and copies before it continues, and the completion after the files are written; `begin_s`,
    the first of the two; `written_s`, until the files are written; `digest_s`, the part of it that the digests of the
    files take (all medians of `rounds`); `ratio`, median of the rounds' `critical_s` / `synchronous_s`; `digest_ratio`,
    that of `digest_s` / `written_s`.
    """
    store = open_store("127.0.0.1", pipeline)
    context = multiprocessing.get_context("spawn")
    ranks, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="meds-bench-", dir=directory) as target:
        for rank in range(pipeline):
            ours, theirs = context.Pipe()
            arguments = (theirs, store.address, rank, pipeline, rounds, shape, target)
            ranks.append(context.Process(target=_rank, args=arguments, daemon=True))
            with placed_on(None):
                ranks[-1].start()
            theirs.close()
            pipes.append(ours)
        reports = [pipe.recv() for pipe in pipes]
        for process in ranks:
            process.join()
    # All ranks wait for the slowest.
    seconds = {name: [max(times) for times in zip(*(r[name] for r in reports), strict=True)] for name in reports[0]}
    (size,) = set(seconds.pop("bytes"))
    return {
        "bytes": size,
        **{f"{name}_s": statistics.median(values) for name, values in seconds.items()},
        "ratio": _median_ratio(seconds["critical"], seconds["synchronous"]),
        "digest_ratio": _median_ratio(seconds["digest"], seconds["written"]),
        "pipeline": pipeline,
        "rounds": rounds,
    }


def _rank(
    pipe: Connection, store: StoreAddress, rank: int, pipeline: int, rounds: int, shape: ModelShape, target: str
) -> None:
    os.environ.update(rank_env_vars(Config()))
    torch.set_num_threads(1)
    join(store, rank, pipeline)
    parallel = ParallelConfig(pipeline=pipeline)
    form_groups(parallel, seed=0)
    model_config = transformer_config(shape, ModelConfig(dtype="bfloat16"), parallel)
    chunks = build_chunks(shape, model_config, max_sequence_length=64)
    for parameter in chunks[0].parameters():
        nn.init.normal_(parameter, std=0.02)
    adam = optimizer.build(optimizer.wrap(chunks), model_config, OptimizerConfig())
    optimizer_state.make_state(adam)
    copies = HostCopies()
    names = ("synchronous", "critical", "begin", "written", "digest", "bytes")
    report: dict[str, list[float]] = {name: [] for name in names}

    def begin(name: str, number: int) -> tuple[PolicySave, Path]:
        path = Path(target) / f"{name}{number}"
        path.mkdir(exist_ok=True)
        dist.barrier()
        return PolicySave(chunks, adam, shape, path, copies), path

    for number in range(rounds):
        began = time.perf_counter()
        save, path = begin("synchronous", number)
        save.finish()
        report["synchronous"].append(time.perf_counter() - began)
        report["bytes"].append(_clear(path, rank))
        began = time.perf_counter()
        save, path = begin("asynchronous", number)
        report["begin"].append(time.perf_counter() - began)
        while not save.written:
            time.sleep(POLL_SECONDS)
        report["written"].append(time.perf_counter() - began)
        dist.barrier()
        began = time.perf_counter()
        written = save.finish()
        report["critical"].append(report["begin"][-1] + time.perf_counter() - began)
        began = time.perf_counter()
        for name in written:
            file_digest(path / name)
        report["digest"].append(time.perf_counter() - began)
        dist.barrier()
        _clear(path, rank)
    pipe.send(report)


def _median_ratio(parts: list[float], wholes: list[float]) -> float:
    return statistics.median(part / whole for part, whole in zip(parts, wholes, strict=True))


def _clear(path: Path, rank: int) -> int:
    """Bytes of a checkpoint, which is removed."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    dist.barrier()
    if rank == 0:
        shutil.rmtree(path)
    dist.barrier()
    return size
