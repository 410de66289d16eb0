"""`meds train` with engines that are killed: python -m tests.faults.killed_engines_run CONFIG [KEY=VALUE]...

In step 2 the process that computes for the last engine is killed while it generates, in step 3 that of the first engine
during the weight update.
"""

import os
import signal
import sys
import time

import ray

from meds_megatron.config import load_config
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.trainer.main import train
from meds_megatron.trainer.weight_sync import WeightSync

GENERATION_TO_KILL = 2
UPDATE_TO_KILL = 3
BUCKET_TO_KILL = 3
"""Bucket of the update, counted from 1: some weights have been loaded, some have not."""


def processes_of(actor) -> list[int]:
    """The engine's own process, then those of its tensor-parallel ranks if it has several."""

    def look(_) -> list[int]:
        import psutil

        children = psutil.Process().children(recursive=True)
        workers = [child.pid for child in children if "VLLM::Worker" in " ".join(child.cmdline())]
        return [os.getpid(), *workers]

    return ray.get(actor.__ray_call__.remote(look))


def kill(process: int) -> None:
    print(f"killing process {process}", file=sys.stderr)
    os.kill(process, signal.SIGKILL)


def main() -> None:
    submit, begin = EnginePool.submit, WeightSync._begin
    generations, buckets, next_victim = 0, 0, None

    def submit_and_kill(self, *arguments):
        nonlocal generations
        generations += 1
        if generations != GENERATION_TO_KILL:
            return submit(self, *arguments)
        victim = processes_of(self.engines[-1].actor)[-1]
        numbers = submit(self, *arguments)
        time.sleep(0.02)
        kill(victim)
        return numbers

    def begin_and_kill(self, *arguments):
        nonlocal buckets, next_victim
        buckets = buckets + 1 if self.version == UPDATE_TO_KILL else 0
        if buckets == 1:
            next_victim = processes_of(self._pool.engines[0].actor)[0]
        transfer = begin(self, *arguments)
        if buckets == BUCKET_TO_KILL:
            kill(next_victim)
        return transfer

    EnginePool.submit, WeightSync._begin = submit_and_kill, begin_and_kill
    train(load_config(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
