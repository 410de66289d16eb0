"""New weights for a real engine, against transformers with the same weights."""

import pytest
import ray

from meds_megatron.launch.placement import Placement
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.rollout.sampling import Sampling
from tests.rollout.disk_trainer import DiskTrainer
from tests.rollout.engine_cases import PROMPTS, engine_config, logprob_error, make_model

SAMPLING = Sampling(responses=2, max_tokens=40)
# Longer than a block of the prefix cache, which only whole blocks enter.
LONG_PROMPT = [40 + (11 * j) % 90 for j in range(290)]


@pytest.fixture(
    scope="module", params=[("qwen3 tied", 1), ("qwen2 untied", 2)], ids=["qwen3 tied TP1", "qwen2 untied TP2"]
)
def case(request, ray_cluster, tmp_path_factory):
    """An engine that has read no weights, and two directories with weights and the trainers that have them."""
    name, tensor = request.param
    directories = [make_model(tmp_path_factory.mktemp("model"), name, seed) for seed in (0, 1)]
    shared = tmp_path_factory.mktemp("shared")
    trainers = [DiskTrainer(directory, shared, tensor) for directory in directories]
    config = engine_config(tensor=tensor)
    placement = Placement(config.cluster, use_gpu=False)
    group = EngineGroup(config, str(directories[0]), use_gpu=False, placement=placement, read_weights=False)
    group.start()
    trainers[0].connect(group)
    yield group, directories, trainers
    group.close()


def test_the_engine_computes_with_each_new_version(case):
    group, directories, trainers = case
    prompts = [*PROMPTS, LONG_PROMPT]
    for version, place in enumerate([0, 1, 0, 1]):
        trainers[place].update(group, version)
        responses = group.generate(prompts, SAMPLING, seed=version)
        assert {response.weights_version for response in responses} == {version}
        assert logprob_error(directories[place], prompts, responses) < 1e-4
    assert group.fleet.restarts == 0


def test_a_stale_prefix_cache_would_be_seen(case):
    group, directories, (old, new) = case
    old.update(group, 4)
    group.generate([LONG_PROMPT], SAMPLING, seed=0)
    staged = [new.stage(number) for number in new.plan.groups]
    run = _update_without_reset([part.handles for part in staged], LONG_PROMPT)
    without_reset, with_reset = ray.get(group.engines[0].__ray_call__.remote(run))
    assert with_reset == pytest.approx(_likeliest_logprob(directories[1]), abs=1e-4)
    assert abs(without_reset - with_reset) > 1e-2


def test_the_engine_is_stale_while_an_update_lasts(case):
    group, _, (_, new) = case
    (engine,) = group.engines
    ray.get(engine.begin_weight_update.remote(5))
    refused = [[PROMPTS[0]], [0], SAMPLING, 0]
    with pytest.raises(RuntimeError, match="engine 0 has stale weights"):
        ray.get(engine.generate.remote(*refused))
    new.load(group, new.plan.groups)
    with pytest.raises(RuntimeError, match="engine 0 has stale weights"):
        ray.get(engine.generate.remote(*refused))
    ray.get(engine.finish_weight_update.remote())
    group.generate(PROMPTS, SAMPLING, seed=0)


def test_an_engine_that_failed_in_an_update_is_not_used_again(case):
    """The last test of an engine."""
    group, _, (_, new) = case
    (engine,) = group.engines
    ray.get(engine.begin_weight_update.remote(6))
    new.load(group, list(new.plan.groups)[1:])
    with pytest.raises(Exception, match=r"the weight update lacks model\.embed_tokens\.weight"):
        ray.get(engine.finish_weight_update.remote())
    with pytest.raises(RuntimeError, match="engine 0 has stale weights"):
        ray.get(engine.generate.remote([PROMPTS[0]], [0], SAMPLING, 0))
    with pytest.raises(RuntimeError, match="engine 0 failed in a weight update: start it anew"):
        ray.get(engine.begin_weight_update.remote(7))


def _update_without_reset(handles, prompt):
    """A function of an engine that loads all groups with vLLM's calls alone and returns the log-probability of the
    likeliest next token, before and after the prefix cache is reset."""

    # A function within a function travels to the actor whole, where this module cannot be imported.
    def run(engine) -> tuple[float, float]:
        from vllm import SamplingParams, TokensPrompt

        def logprob() -> float:
            parameters = SamplingParams(temperature=0, max_tokens=1, logprobs=0, flat_logprobs=True, detokenize=False)
            (output,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], parameters, use_tqdm=False)
            return output.outputs[0].logprobs.logprobs[0]

        engine.llm.collective_rpc("start_weight_update")
        for group, staged in enumerate(handles):
            info = {"group": group, "handles": staged, "checksums": False}
            engine.llm.collective_rpc("update_weights", kwargs={"update_info": info})
        engine.llm.collective_rpc("finish_weight_update")
        stale = logprob()
        engine.llm.reset_prefix_cache()
        return stale, logprob()

    return run


def _likeliest_logprob(directory) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([LONG_PROMPT])).logits[0, -1].log_softmax(-1).max().item()
