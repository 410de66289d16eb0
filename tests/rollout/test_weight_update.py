"""New weights for a real engine, against transformers with the same weights."""

import pytest
import ray
from safetensors.torch import load_file

from meds_megatron.launch.placement import Placement
from meds_megatron.rollout.group import EngineGroup
from meds_megatron.rollout.sampling import Sampling
from meds_megatron.weights.shared_memory import write_bucket
from tests.rollout.engine_cases import PROMPTS, engine_config, logprob_error, make_model

SAMPLING = Sampling(responses=2, max_tokens=40)
# Longer than a block of the prefix cache, which only whole blocks enter.
LONG_PROMPT = [40 + (11 * j) % 90 for j in range(290)]


@pytest.fixture(
    scope="module", params=[("qwen3 tied", 1), ("qwen2 untied", 2)], ids=["qwen3 tied TP1", "qwen2 untied TP2"]
)
def case(request, ray_cluster, tmp_path_factory):
    """An engine with the weights of one directory and another directory with weights to come."""
    name, tensor = request.param
    old, new = (make_model(tmp_path_factory.mktemp("model"), name, seed) for seed in (0, 1))
    config = engine_config(tensor=tensor)
    group = EngineGroup(config, str(old), use_gpu=False, placement=Placement(config.cluster, use_gpu=False))
    group.start(disk_weights_version=0)
    yield group, old, new
    group.close()


def buckets_of(directory, shared, cut=3):
    """The weights of a model directory, in `cut` buckets of unrelated tensors."""
    weights = load_file(directory / "model.safetensors")
    names = sorted(weights)
    return [write_bucket(shared, f"bucket{i}", {n: weights[n] for n in names[i::cut]}) for i in range(cut)]


def update(group, version, buckets):
    group.begin_weight_update(version)
    for bucket in buckets:
        group.load_bucket(bucket)
    group.finish_weight_update()


def test_the_engine_computes_with_each_new_version(case, tmp_path):
    group, old, new = case
    prompts = [*PROMPTS, LONG_PROMPT]
    assert logprob_error(old, prompts, group.generate(prompts, SAMPLING, seed=0)) < 1e-4
    for version, directory in [(1, new), (2, old), (3, new)]:
        update(group, version, buckets_of(directory, tmp_path))
        responses = group.generate(prompts, SAMPLING, seed=version)
        assert {response.weights_version for response in responses} == {version}
        assert logprob_error(directory, prompts, responses) < 1e-4
    assert not list(tmp_path.iterdir())


def test_a_stale_prefix_cache_would_be_seen(case, tmp_path):
    group, old, new = case
    update(group, 4, buckets_of(old, tmp_path))
    group.generate([LONG_PROMPT], SAMPLING, seed=0)
    paths = [bucket.path for bucket in buckets_of(new, tmp_path)]
    without_reset, with_reset = ray.get(group.engines[0].__ray_call__.remote(_update_without_reset(paths, LONG_PROMPT)))
    assert with_reset == pytest.approx(_likeliest_logprob(new), abs=1e-4)
    assert abs(without_reset - with_reset) > 1e-2


def test_the_engine_is_stale_while_an_update_lasts(case, tmp_path):
    group, _, new = case
    group.begin_weight_update(5)
    with pytest.raises(RuntimeError, match="stale weights"):
        group.generate(PROMPTS, SAMPLING, seed=0)
    for bucket in buckets_of(new, tmp_path):
        group.load_bucket(bucket)
    with pytest.raises(RuntimeError, match="stale weights"):
        group.generate(PROMPTS, SAMPLING, seed=0)
    group.finish_weight_update()
    group.generate(PROMPTS, SAMPLING, seed=0)


def test_an_engine_that_failed_in_an_update_is_not_used_again(case, tmp_path):
    """The last test of an engine."""
    group, _, new = case
    group.begin_weight_update(6)
    first, *others = buckets_of(new, tmp_path)
    for bucket in others:
        group.load_bucket(bucket)
    with pytest.raises(Exception, match=f"the weight update lacks .*{first.names[0]}"):
        group.finish_weight_update()
    with pytest.raises(RuntimeError, match="engine 0 has stale weights"):
        group.generate(PROMPTS, SAMPLING, seed=0)
    with pytest.raises(RuntimeError, match="engine 0 failed in a weight update: start it anew"):
        group.begin_weight_update(7)


def _update_without_reset(paths, prompt):
    """A function of an engine that loads the buckets with vLLM's calls alone and returns the log-probability of the
    likeliest next token, before and after the prefix cache is reset."""

    # A function within a function travels to the actor whole, where this module cannot be imported.
    def run(engine) -> tuple[float, float]:
        from vllm import SamplingParams, TokensPrompt

        def logprob() -> float:
            parameters = SamplingParams(temperature=0, max_tokens=1, logprobs=0, flat_logprobs=True, detokenize=False)
            (output,) = engine.llm.generate([TokensPrompt(prompt_token_ids=prompt)], parameters, use_tqdm=False)
            return output.outputs[0].logprobs.logprobs[0]

        engine.llm.collective_rpc("start_weight_update")
        for path in paths:
            engine.llm.collective_rpc("update_weights", kwargs={"update_info": {"path": path}})
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
