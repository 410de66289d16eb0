"""A real engine that is frozen, or one of its ranks: it is named and replaced in place."""

import os
import re
import signal

import psutil
import pytest

from meds_megatron.cluster.placement import Placement
from meds_megatron.faults.supervision import Supervisor
from meds_megatron.faults.watchdog import Watchdog
from meds_megatron.logs import process_logging
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.settings import Sampling
from meds_megatron.run.timer import PhaseTimer
from tests.rollout.engine_cases import PROMPTS, engine_config, make_model
from tests.rollout.test_pool import flat

SAMPLING = Sampling(responses=4, max_tokens=200, stop=False)


pytestmark = pytest.mark.usefixtures("cpu_engines", "shared_ray")


def freeze(pool: EnginePool, rank: int | None) -> None:
    """Stops the engine: its own process, or that of one of its ranks."""
    process = pool.engines[0].place[1]
    if rank is not None:
        workers = [p for p in psutil.Process(process).children(True) if "VLLM::Worker" in " ".join(p.cmdline())]
        process = sorted(worker.pid for worker in workers)[rank]
    os.kill(process, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("tensor", "rank", "what", "state"),
    [(1, None, "does not answer", "stopped"), (2, 1, r"is stuck in _?add \(.*\)", "")],
    ids=["the engine", "one of its ranks"],
)
def test_a_frozen_engine_is_named_and_replaced_in_place(tensor, rank, what, state, tmp_path, caplog):
    model_dir = make_model(tmp_path, "qwen3 tied", seed=0)
    config = engine_config(engines=1, tensor=tensor)
    config.run_dir = str(tmp_path)
    pool = EnginePool(config, str(model_dir), False, Placement(config.cluster, use_gpu=False), disk_version=0)
    pool.start()
    first = pool.engines[0].place[1]
    family = [psutil.Process(first), *psutil.Process(first).children(recursive=True)]
    timer = PhaseTimer()
    # The supervisor's alarm is not the pool's: a new engine may take longer to start than the watchdog waits.
    with (
        process_logging(tmp_path, "driver", caplog.handler),
        GraderPool(workers=1, timeout_seconds=1) as graders,
        Supervisor(str(tmp_path)) as supervisor,
        Watchdog(0.1, supervisor, timer, pool, graders),
        timer("rollout"),
    ):
        freeze(pool, rank)
        completions = pool.generate(PROMPTS, SAMPLING, seed=3)
    pool.close()
    assert len(flat(completions)) == len(PROMPTS) * SAMPLING.responses
    assert pool.restarts == 1
    (sentence,) = [message for message in caplog.messages if "is restarted" in message]
    assert re.match(
        rf"engine 0 on node 0 failed and is restarted: {what} \(process {first} on .*{state}\): nothing has progressed "
        r"for 0.1 minutes \(faults.hang_minutes\) in phase rollout, entered at ",
        sentence,
    )
    psutil.wait_procs(family, timeout=60)
    assert not [process for process in family if process.is_running()], "ranks that are stopped are killed, too"
