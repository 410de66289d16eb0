"""An engine whose process is killed while it generates."""

import logging
import os
import signal

import pytest
import ray

from meds_megatron.rollout.health import EngineState
from meds_megatron.rollout.settings import Sampling
from tests.ray_session import two_engines
from tests.rollout.engine_cases import PROMPTS, logprob_error


@pytest.fixture(scope="module")
def pool(cpu_engines, shared_ray):
    pool = two_engines(shared_ray.model)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def model_dir(shared_ray):
    return shared_ray.model


@pytest.mark.parametrize("seed", [9, None])
def test_unfinished_requests_of_a_killed_engine_are_generated_by_the_others(pool, model_dir, caplog, seed):
    pool.metrics()
    process = ray.get(pool.engines[0].actor.__ray_call__.remote(lambda _: os.getpid()))
    numbers = pool.submit(PROMPTS, Sampling(responses=16, max_tokens=100), seed)
    os.kill(process, signal.SIGKILL)
    made = {}
    with caplog.at_level(logging.WARNING):
        while len(made) < len(PROMPTS):
            made |= pool.wait()
    completions = [made[number] for number in numbers]
    assert [len(of_prompt) for of_prompt in completions] == [16] * len(PROMPTS)
    assert logprob_error(model_dir, PROMPTS, [of_prompt[::7] for of_prompt in completions]) < 1e-4
    assert pool.metrics() == {"rollout/engine_restarts": 1, "rollout/regenerated_prompts": 3}
    assert caplog.text.count("engine 0 on node 0 failed and is restarted: ") == 1
    pool._wait_until_started()
    assert [engine.health.state for engine in pool.engines] == [EngineState.FRESH] * 2
    again = pool.generate(PROMPTS, Sampling(responses=4, max_tokens=100), seed=10)
    assert logprob_error(model_dir, PROMPTS, again) < 1e-4
    assert pool.metrics()["rollout/engine_restarts"] == 0
