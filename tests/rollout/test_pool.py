"""Two real engines on one small model."""

import pytest
import ray

from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.settings import Sampling
from tests.rollout.engine_cases import PROMPTS, comparable, engine_config, logprob_error

SAMPLING = Sampling(responses=4, max_tokens=100)


@pytest.fixture(scope="module")
def pool(cpu_engines, shared_ray):
    return shared_ray.pool


@pytest.fixture(scope="module")
def model_dir(shared_ray):
    return shared_ray.model


@pytest.fixture(scope="module")
def completions(pool):
    return pool.generate(PROMPTS, SAMPLING, seed=3)


def flat(completions):
    return [completion for of_prompt in completions for completion in of_prompt]


def texts(completions):
    return {tuple(completion.token_ids_S) for completion in flat(completions)}


def test_completions_come_in_the_order_of_the_prompts(completions):
    assert [len(of_prompt) for of_prompt in completions] == [4] * len(PROMPTS)
    assert all(completion.version_changes == [(0, 0)] for completion in flat(completions))
    assert len(texts(completions)) == len(flat(completions))


def test_logprobs_are_those_of_transformers(completions, model_dir):
    assert all(len(completion.logprobs_R) == len(completion.token_ids_S) for completion in flat(completions))
    assert logprob_error(model_dir, PROMPTS, completions) < 1e-4


def test_logprobs_have_the_temperature_applied(pool, model_dir):
    completions = pool.generate(PROMPTS, Sampling(responses=1, max_tokens=20, temperature=0.6), seed=4)
    assert logprob_error(model_dir, PROMPTS, completions, temperature=0.6) < 1e-4


def test_a_completion_stops_with_the_end_token_or_at_its_limit(completions):
    from meds_megatron.toy_tasks.arithmetic_model import build_tokenizer

    end = build_tokenizer().eos_token_id
    stopped = [
        completion.token_ids_S.tolist() for completion in flat(completions) if completion.finish_reason == "stop"
    ]
    cut = [completion.token_ids_S.tolist() for completion in flat(completions) if completion.finish_reason == "length"]
    assert stopped and len(stopped) + len(cut) == len(flat(completions))
    assert all(token_ids.index(end) == len(token_ids) - 1 for token_ids in stopped)
    assert all(end not in token_ids and len(token_ids) == 100 for token_ids in cut)


def test_without_stop_all_completions_have_the_limit(pool):
    lengths = [20, 35, 50, 65, 90]
    completions = pool.generate(PROMPTS, [Sampling(6, length, stop=False) for length in lengths])
    assert [{len(completion.token_ids_S) for completion in of_prompt} for of_prompt in completions] == [
        {length} for length in lengths
    ]


def test_text_and_answer_position_belong_to_the_tokens(completions):
    from meds_megatron.rollout.answer_position import AnswerLocator
    from meds_megatron.toy_tasks.arithmetic_model import build_tokenizer

    tokenizer = build_tokenizer()
    locator = AnswerLocator(tokenizer)
    for completion in flat(completions):
        assert completion.text == tokenizer.decode(completion.token_ids_S, skip_special_tokens=True)
        position = locator.locate(completion.token_ids_S.tolist())
        assert (completion.answer_position, completion.no_answer_reason) == position


def test_a_seed_repeats_its_completions_and_no_other(pool, completions):
    again = pool.generate(PROMPTS, SAMPLING, seed=3)
    other = pool.generate(PROMPTS, SAMPLING, seed=5)
    assert comparable(again) == comparable(completions)
    assert not texts(other) & texts(completions)


def test_completions_are_those_of_plain_vllm(pool, completions, model_dir):
    """`LLM.generate` in a process with an engine's variables, seeded alike, gives the same tokens and log-probs."""

    # A function within a function is pickled by value: the actor cannot import this module.
    def generate(engine, config, model_dir, shares):
        import numpy as np
        from vllm import SamplingParams, TokensPrompt
        from vllm.utils.torch_utils import set_random_seed

        from meds_megatron.rollout.llm import make_llm, stop_token_ids

        llm = make_llm(config, model_dir, use_gpu=False)
        parameters = SamplingParams(
            n=4, max_tokens=100, logprobs=0, flat_logprobs=True, stop_token_ids=stop_token_ids(model_dir, None)
        )
        made = []
        for index, share in enumerate(shares):
            set_random_seed(int(np.random.SeedSequence([3, index]).generate_state(1)[0]))
            llm.reset_prefix_cache()
            prompts = [TokensPrompt(prompt_token_ids=p) for p in share]
            made += [
                [(list(c.token_ids), np.float32(c.logprobs.logprobs)) for c in output.outputs]
                for output in llm.generate(prompts, parameters, use_tqdm=False)
            ]
        llm.llm_engine.engine_core.shutdown()
        return made

    class Plain:
        pass

    plain = ray.remote(Plain).options(**pool.engines[0].options).remote()
    shares = [PROMPTS[place::2] for place in range(2)]
    expected = ray.get(plain.__ray_call__.remote(generate, engine_config(), str(model_dir), shares))
    ray.kill(plain)
    found = [completions[index] for place in range(2) for index in range(place, len(PROMPTS), 2)]
    assert [[c.token_ids_S.tolist() for c in of_prompt] for of_prompt in found] == [
        [token_ids for token_ids, _ in of_prompt] for of_prompt in expected
    ]
    for of_prompt, expected_of_prompt in zip(found, expected, strict=True):
        for completion, (_, logprobs_R) in zip(of_prompt, expected_of_prompt, strict=True):
            assert completion.logprobs_R.tobytes() == logprobs_R.tobytes()


@pytest.mark.parametrize("seed", [6, None])
def test_engines_draw_differently(pool, seed):
    (first,), (second,) = pool.generate([PROMPTS[0], PROMPTS[0]], Sampling(responses=1, max_tokens=30), seed)
    assert first.token_ids_S.tolist() != second.token_ids_S.tolist()


def test_batches_may_be_submitted_ahead_and_do_not_change_each_other(pool):
    alone = [pool.generate(PROMPTS[:3], SAMPLING, seed=7), pool.generate(PROMPTS[3:], SAMPLING, seed=8)]
    numbers = [pool.submit(PROMPTS[:3], SAMPLING, seed=7), pool.submit(PROMPTS[3:], SAMPLING, seed=8)]
    made = {}
    while len(made) < len(PROMPTS):
        made |= pool.wait()
    for expected, batch in zip(alone, numbers, strict=True):
        assert comparable(made[number] for number in batch) == comparable(expected)


def test_requests_are_answered_one_by_one_by_the_least_loaded_engine(pool):
    """A long request on one engine; the other generates all short ones that are beyond what is in flight."""
    prompts = [[40 + number, 60] for number in range(120)]
    samplings = [Sampling(4, 100 if number == 0 else 5, stop=False) for number in range(120)]
    numbers = pool.submit(prompts, samplings)
    assert len(pool._queue) > 0
    order = []
    while len(order) < len(numbers):
        order += pool.wait()
    assert sorted(order) == numbers
    assert order[-1] == numbers[0]


def test_an_engine_with_unfinished_requests_refuses_a_weight_update(pool):
    actor = pool.engines[0].actor
    ray.get(actor.add.remote([Request(0, PROMPTS[0], Sampling(4, 100, stop=False))]))
    with pytest.raises(RuntimeError, match="engine 0 has unfinished requests: wait for them before a weight update"):
        ray.get(actor.begin_weight_update.remote(1))
    taken = actor.take_finished.options(concurrency_group="finished").remote()
    assert list(ray.get(taken)) == [0]
