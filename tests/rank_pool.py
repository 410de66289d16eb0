"""Real ranks for tests: a process group of fresh processes for every case, on CPUs forked from one that has torch
imported."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from meds_megatron.actor.worker import rank_env_vars
from meds_megatron.bench.processes import placed_on
from meds_megatron.config import Config
from tests.devices import rank_gpus
from tests.limits import HANG_SECONDS

EXIT_SECONDS = 10


class RankPool:
    """Starts ranks quickly: a server process imports torch and megatron-core once, and every rank is a fork of it.

    A rank lives for one case only. gloo keeps threads for every process group that megatron-core makes, so ranks that
    stayed alive would drown in them. Ranks on GPUs are not forks: libraries that the server has imported may have
    initialised CUDA, which does not survive a fork.
    """

    def __init__(self, gpus: int):
        """Cases of up to `gpus` ranks have a GPU for each, all others compute on the CPU."""
        os.environ["OMP_NUM_THREADS"] = "1"
        self._gpus = gpus
        self._on_cpu = multiprocessing.get_context("forkserver")
        self._on_cpu.set_forkserver_preload(["meds_megatron.actor.policy", "tests.rank_pool"])
        self._on_gpu = multiprocessing.get_context("spawn")

    def run(self, world_size: int, function: Callable, *args) -> list:
        """Runs `function(rank, *args)` on ranks 0..world_size-1 of a process group; their results by rank.

        `function` must be importable. An exception on any rank is raised here with that rank's traceback.
        """
        from meds_megatron.weights.store import open_store

        store = open_store("127.0.0.1", world_size)
        processes, pipes = [], []
        for rank, gpu in enumerate(rank_gpus(world_size, self._gpus)):
            context = self._on_cpu if gpu is None else self._on_gpu
            ours, theirs = context.Pipe()
            task = (rank, world_size, store.address, function, args)
            process = context.Process(target=_serve, args=(theirs, gpu, task), daemon=True)
            with placed_on(gpu):
                process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            answers = [_receive(pipe) for pipe in pipes]
        finally:
            # A rank ends by itself when its pipe closes, and with it what it has started; one that hangs is killed.
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(EXIT_SECONDS)
                process.kill()
                process.join()
        for rank, (ok, value) in enumerate(answers):
            if not ok:
                raise AssertionError(f"rank {rank} of {world_size}:\n{value}")
        return [value for _, value in answers]


def _receive(pipe: Connection) -> tuple[bool, object]:
    if not pipe.poll(HANG_SECONDS):
        return False, f"no answer within {HANG_SECONDS} s"
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process died"


def _serve(pipe: Connection, gpu: int | None, task: tuple) -> None:
    if gpu is None:
        # The server may have been started by others, who see GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.update(rank_env_vars(Config()))
    import torch

    from meds_megatron.actor.process_group import join

    rank, world_size, store, function, args = task
    torch.set_num_threads(1)
    try:
        join(store, rank, world_size, timeout_minutes=2)
        pipe.send((True, function(rank, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.poll(None)
