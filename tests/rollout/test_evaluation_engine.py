"""Engines of an evaluation: a response depends on its seed, not on its batch."""

import pytest

from meds_megatron.cluster.placement import Placement
from meds_megatron.rollout.llm import STEP_TOKENS
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.settings import Sampling
from tests.rollout.engine_cases import comparable, engine_config, make_model

LONG = [[40 + (7 * i + 11 * j) % 90 for j in range(280 + i)] for i in range(18)]
"""More tokens than an engine without CUDA takes in a step."""


@pytest.fixture(scope="module")
def pool(cpu_engines, shared_ray, tmp_path_factory):
    config = engine_config()
    directory = make_model(tmp_path_factory.mktemp("model"), "qwen3 tied", seed=0)
    placement = Placement(config.cluster, use_gpu=False)
    pool = EnginePool(config, str(directory), False, placement, disk_version=0, evaluation=True)
    pool.start()
    yield pool
    pool.close()


def test_responses_of_a_seed_are_the_same_in_any_batch(pool):
    assert sum(map(len, LONG)) > STEP_TOKENS
    samplings = [Sampling(responses=2, max_tokens=20, seed=1000 * number) for number in range(len(LONG))]
    together = pool.generate(LONG, samplings)
    alone = [pool.generate([prompt], [own])[0] for prompt, own in zip(LONG[:4], samplings[:4], strict=True)]
    assert comparable(together[:4]) == comparable(alone)
    assert comparable(pool.generate(LONG[::-1], samplings[::-1])[::-1]) == comparable(together)
    first, second = together[0]
    assert first.token_ids_S.tolist() != second.token_ids_S.tolist()


def test_there_are_no_log_probs(pool):
    ((completion,),) = pool.generate(LONG[:1], Sampling(responses=1, max_tokens=5))
    assert len(completion.token_ids_S) and completion.logprobs_R.size == 0
