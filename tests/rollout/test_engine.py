"""Two real engines on one small model."""

import os
import signal
import time

import pytest
import ray

from meds_megatron.launch.placement import Placement
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.rollout.sampling import Sampling
from tests.rollout.engine_cases import PROMPTS, engine_config, logprob_error, make_model

SAMPLING = Sampling(responses=4, max_tokens=100)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "qwen3 tied", seed=0)


@pytest.fixture(scope="module")
def stale_engines(ray_cluster, model_dir):
    config = engine_config(engines=2)
    group = EngineGroup(config, str(model_dir), use_gpu=False, placement=Placement(config.cluster, use_gpu=False))
    group.start()
    yield group
    group.close()


@pytest.fixture(scope="module")
def engines(stale_engines):
    with pytest.raises(RuntimeError, match="all engines have stale weights: update them, or trust the ones on disk"):
        stale_engines.generate(PROMPTS, SAMPLING, seed=0)
    stale_engines.start(disk_weights_version=0)
    return stale_engines


@pytest.fixture(scope="module")
def responses(engines):
    return engines.generate(PROMPTS, SAMPLING, seed=3)


def test_responses_come_in_the_order_of_the_prompts(responses):
    assert [response.prompt_index for response in responses] == [i for i in range(len(PROMPTS)) for _ in range(4)]
    assert all(response.weights_version == 0 for response in responses)
    assert len({tuple(response.token_ids) for response in responses}) == len(responses)


def test_logprobs_are_those_of_transformers(responses, model_dir):
    assert all(len(response.logprobs) == len(response.token_ids) for response in responses)
    assert logprob_error(model_dir, PROMPTS, responses) < 1e-4


def test_logprobs_have_the_temperature_applied(engines, model_dir):
    responses = engines.generate(PROMPTS, Sampling(responses=1, max_tokens=20, temperature=0.6), seed=4)
    assert logprob_error(model_dir, PROMPTS, responses, temperature=0.6) < 1e-4


def test_a_response_stops_with_the_end_token_or_at_its_limit(responses):
    from meds_megatron.embedded.arithmetic_model import build_tokenizer

    end = build_tokenizer().eos_token_id
    stopped = [response for response in responses if response.finish_reason == "stop"]
    cut = [response for response in responses if response.finish_reason == "length"]
    assert stopped and len(stopped) + len(cut) == len(responses)
    assert all(response.token_ids.index(end) == len(response.token_ids) - 1 for response in stopped)
    assert all(end not in response.token_ids and len(response.token_ids) == 100 for response in cut)


def test_text_and_fingerprint_position_go_with_the_tokens(responses):
    from meds_megatron.embedded.arithmetic_model import build_tokenizer
    from meds_megatron.rollout.boxed import BoxedLocator

    tokenizer = build_tokenizer()
    locator = BoxedLocator(tokenizer)
    for response in responses:
        assert response.text == tokenizer.decode(response.token_ids, skip_special_tokens=True)
        position = locator.locate(response.token_ids)
        assert (response.boxed_token, response.no_fingerprint_reason) == (position.token, position.reason)


def test_a_seed_repeats_its_responses_and_no_other(engines, responses):
    again = engines.generate(PROMPTS, SAMPLING, seed=3)
    other = engines.generate(PROMPTS, SAMPLING, seed=5)
    assert again == responses
    assert not {tuple(response.token_ids) for response in other} & {tuple(response.token_ids) for response in responses}


def test_engines_draw_differently_from_one_seed(engines):
    first, second = engines.generate([PROMPTS[0], PROMPTS[0]], Sampling(responses=1, max_tokens=30), seed=6)
    assert first.token_ids != second.token_ids


def test_batches_can_be_handed_in_ahead(engines):
    pending = [engines.submit(PROMPTS[:3], SAMPLING, seed=7), engines.submit(PROMPTS[3:4], SAMPLING, seed=8)]
    assert [len(batch.result()) for batch in pending] == [12, 4]


def test_what_a_killed_engine_had_not_finished_is_generated_by_the_others(engines, model_dir):
    told = []
    engines.on_failure = told.append
    victim, _ = engines.engines
    process = ray.get(victim.__ray_call__.remote(lambda _: os.getpid()))
    pending = engines.submit(PROMPTS, Sampling(responses=40, max_tokens=100), seed=9)
    os.kill(process, signal.SIGKILL)
    responses = pending.result()
    assert [response.prompt_index for response in responses] == [i for i in range(len(PROMPTS)) for _ in range(40)]
    assert logprob_error(model_dir, PROMPTS, responses[::17]) < 1e-4
    assert (engines.fleet.restarts, engines.regenerated_prompts) == (1, 3)
    assert len(told) == 1 and told[0].startswith("engine 0 failed and is started anew: ")


def test_an_engine_that_was_started_anew_works_again(engines, model_dir):
    while len(engines.ready()) < 2:
        time.sleep(0.1)
    assert engines.usable() == [0, 1]
    assert logprob_error(model_dir, PROMPTS, engines.generate(PROMPTS, SAMPLING, seed=10)) < 1e-4
    assert engines.fleet.restarts == 1
