"""Weight updates while a real engine generates, against transformers with the weights of each token's version."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from meds_megatron.cluster.placement import Placement
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.settings import Sampling
from tests.rollout.disk_trainer import DiskTrainer
from tests.rollout.engine_cases import PROMPTS, engine_config, make_model

# The long prompt fills blocks of the prefix cache, which all its responses share.
LONG_PROMPT = [40 + (11 * j) % 90 for j in range(290)]
SAMPLING = Sampling(responses=6, max_tokens=100, stop=False)


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def case(request, cpu_engines, shared_ray, tmp_path_factory):
    """An engine that updates may interrupt, two directories with weights and the trainers that have them."""
    directories = [make_model(tmp_path_factory.mktemp("model"), "qwen3 tied", seed) for seed in (0, 1)]
    shared = tmp_path_factory.mktemp("shared")
    trainers = [DiskTrainer(directory, shared, request.param) for directory in directories]
    config = engine_config(tensor=request.param)
    config.train.max_staleness = 1
    pool = EnginePool(config, str(directories[0]), False, Placement(config.cluster, use_gpu=False))
    pool.start()
    trainers[0].connect(pool)
    yield pool, directories, trainers
    pool.close()


def expected_logprobs(model, prompt: list[int], token_ids_S: np.ndarray) -> np.ndarray:
    tokens = torch.tensor([prompt + token_ids_S.tolist()])
    with torch.no_grad():
        logits_RV = model(tokens).logits[0, len(prompt) - 1 : -1]
    return logits_RV.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0].numpy()


def test_every_token_has_the_log_prob_and_the_version_of_the_weights_that_drew_it(case):
    pool, directories, trainers = case
    prompts = [*PROMPTS, LONG_PROMPT]
    version = 0
    trainers[0].update(pool, version)
    numbers = pool.submit(prompts, SAMPLING)
    completions = {}
    while len(completions) < len(numbers):
        # Of every two updates one is made while most of the requests are under way.
        version += 1
        trainers[version % 2].update(pool, version)
        completions |= pool.wait()
        if not pool.running and len(completions) < len(numbers):
            raise AssertionError("requests are lost")
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in directories]
    mixed, differs = 0, 0.0
    for prompt, number in zip(prompts, numbers, strict=True):
        assert len(completions[number]) == 6
        for completion in completions[number]:
            versions_R = completion.policy_versions_R
            assert len(completion.token_ids_S) == len(completion.logprobs_R) == len(versions_R) == 100
            assert (np.diff(versions_R) >= 0).all()
            by_model = [expected_logprobs(model, prompt, completion.token_ids_S) for model in models]
            expected_R = np.where(versions_R % 2 == 0, *by_model)
            np.testing.assert_allclose(completion.logprobs_R, expected_R, atol=1e-4)
            mixed += len(completion.version_changes) > 1
            differs = max(differs, np.abs(by_model[0] - by_model[1]).max())
    assert mixed >= 6 and differs > 1, "the test cannot fail where no response has seen two weights, or both are alike"
    assert pool.engines[0].health.restarts == 0
