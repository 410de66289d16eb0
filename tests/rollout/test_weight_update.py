"""Weight updates of a real engine, against transformers with the same weights."""

import pytest
import ray

from meds_megatron.cluster.placement import Placement
from meds_megatron.rollout.engine import Request
from meds_megatron.rollout.pool import WAITING, EnginePool
from meds_megatron.rollout.settings import Sampling
from tests.devices import gpu_count, tolerance
from tests.rollout.disk_trainer import DiskTrainer
from tests.rollout.engine_cases import PROMPTS, engine_config, logprob_error, make_model

SAMPLING = Sampling(responses=2, max_tokens=40)
# Longer than a block of the prefix cache, which only whole blocks enter.
LONG_PROMPT = [40 + (11 * j) % 90 for j in range(290)]


@pytest.fixture(
    scope="module", params=[("qwen3 tied", 1), ("qwen2 untied", 2)], ids=["qwen3 tied TP1", "qwen2 untied TP2"]
)
def case(request, shared_ray, engine_device, tmp_path_factory):
    """An engine that has read no weights, and two directories with weights and the trainers that have them."""
    name, tensor = request.param
    device = engine_device(tensor)
    directories = [make_model(tmp_path_factory.mktemp("model"), name, seed) for seed in (0, 1)]
    shared = tmp_path_factory.mktemp("shared")
    trainers = [DiskTrainer(directory, shared, tensor, device) for directory in directories]
    config = engine_config(tensor=tensor)
    # All GPUs, so that the engine sees that of the trainers, too.
    config.cluster.ranks_per_node = max(1, gpu_count())
    placement = Placement(config.cluster, use_gpu=device == "cuda")
    assert placement.wait(60)
    pool = EnginePool(config, str(directories[0]), use_gpu=device == "cuda", placement=placement)
    pool.start()
    trainers[0].connect(pool)
    yield pool, directories, trainers
    pool.close()
    placement.close()


def test_the_engine_computes_with_each_new_version(case):
    pool, directories, trainers = case
    prompts = [*PROMPTS, LONG_PROMPT]
    for version, place in enumerate([0, 1, 0, 1]):
        trainers[place].update(pool, version)
        completions = pool.generate(prompts, SAMPLING, seed=version)
        assert {completion.version_changes[0][0] for of_prompt in completions for completion in of_prompt} == {version}
        assert logprob_error(directories[place], prompts, completions) < tolerance(1e-4)
    assert pool.engines[0].health.restarts == 0


def test_a_stale_prefix_cache_would_be_seen(case):
    pool, directories, (old, new) = case
    old.update(pool, 4)
    pool.generate([LONG_PROMPT], SAMPLING, seed=0)
    staged = [new.stage(bucket) for bucket in new.plan.buckets]
    run = _update_without_reset([part.handles for part in staged], LONG_PROMPT)
    without_reset, with_reset = ray.get(pool.engines[0].actor.__ray_call__.remote(run))
    assert with_reset == pytest.approx(_likeliest_logprob(directories[1]), abs=tolerance(1e-4))
    assert abs(without_reset - with_reset) > 1e-2


def test_the_engine_is_stale_while_an_update_lasts(case):
    pool, _, (_, new) = case
    engine = pool.engines[0].actor
    ray.get(engine.begin_weight_update.remote(5))
    assert_refuses_requests(engine)
    new.load(pool, new.plan.buckets)
    assert_refuses_requests(engine)
    ray.get(engine.finish_weight_update.remote())
    pool.generate(PROMPTS, SAMPLING, seed=0)


def test_an_engine_that_failed_in_an_update_is_not_used_again(case):
    """The last test of an engine."""
    pool, _, (_, new) = case
    engine = pool.engines[0].actor
    ray.get(engine.begin_weight_update.remote(6))
    new.load(pool, list(new.plan.buckets)[1:])
    with pytest.raises(Exception, match=r"the weight update lacks model\.embed_tokens\.weight"):
        ray.get(engine.finish_weight_update.remote())
    assert_refuses_requests(engine)
    with pytest.raises(RuntimeError, match="engine 0 failed in a weight update: restart it"):
        ray.get(engine.begin_weight_update.remote(7))


def test_the_pool_waits_for_no_stale_engine(case):
    pool = case[0]
    pool.engines[0].health.update_began()
    pool.submit([PROMPTS[0]], SAMPLING, seed=0)
    with pytest.raises(RuntimeError, match="no engine can generate: wake the engines and run the weight sync first"):
        pool.wait()


def assert_refuses_requests(engine):
    """`add` raises, and so does the call that waits for what it should have made."""
    taken = engine.take_finished.options(concurrency_group=WAITING).remote()
    for call in (engine.add.remote([Request(0, PROMPTS[0], SAMPLING)]), taken):
        with pytest.raises(RuntimeError, match="engine 0 has stale weights: finish a weight update first"):
            ray.get(call)


def _update_without_reset(handles, prompt):
    """A function of an engine that loads all buckets with vLLM's calls alone and returns the log-probability of the
    likeliest next token, before and after the prefix cache is reset."""

    # A function within a function travels to the actor whole, where this module cannot be imported.
    def run(engine) -> tuple[float, float]:
        from vllm import SamplingParams, TokensPrompt

        def logprob() -> float:
            parameters = SamplingParams(temperature=0, max_tokens=1, logprobs=0, flat_logprobs=True, detokenize=False)
            (output,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], parameters, use_tqdm=False)
            return output.outputs[0].logprobs.logprobs[0]

        engine.llm.collective_rpc("start_weight_update")
        for bucket, staged in enumerate(handles):
            info = {"bucket": bucket, "handles": staged, "checksums": False}
            engine.llm.collective_rpc("update_weights", kwargs={"update_info": info})
        engine.llm.collective_rpc("finish_weight_update")
        stale = logprob()
        engine.llm.reset_prefix_cache()
        return stale, logprob()

    return lambda engine: engine.on_vllm_thread(run, engine)


def _likeliest_logprob(directory) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([LONG_PROMPT])).logits[0, -1].log_softmax(-1).max().item()
