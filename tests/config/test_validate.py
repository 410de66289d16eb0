from dataclasses import fields, is_dataclass, replace

import pytest
from omegaconf import OmegaConf

from meds_megatron.config import QWEN, Config, validate, validate_model
from meds_megatron.errors import UserError

MODEL = replace(QWEN["Qwen2.5-7B"], max_positions=4096)


def config_with(**settings) -> Config:
    """A valid config changed by `section__key=value`."""
    dotted = {"model.path": "model", "data.train": ["train.jsonl"]}
    dotted |= {key.replace("__", "."): value for key, value in settings.items()}
    config = OmegaConf.structured(Config)
    for key, value in dotted.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.to_object(config)


def test_the_published_settings_are_valid():
    validate(config_with())
    validate_model(config_with(), MODEL)


def test_every_number_has_a_range_and_its_default_lies_in_it():
    def unbounded(section, prefix=""):
        for field in fields(section):
            value = getattr(section, field.name)
            if is_dataclass(value):
                yield from unbounded(value, f"{prefix}{field.name}.")
            elif {int, float} & {field.type, *getattr(field.type, "__args__", ())} and not field.metadata.get("bounds"):
                yield prefix + field.name

    assert list(unbounded(Config())) == []
    validate(config_with())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(train__steps=0), "train.steps is 0, expected a number above 0"),
        (
            dict(train__max_staleness=1, rollout__deterministic=True),
            "train.max_staleness = 1 trains on groups in the order in which they finish, which rollout.deterministic",
        ),
        (
            dict(train__max_staleness=1, cluster__device="cuda"),
            "train.max_staleness = 1 generates while the trainer computes, but engines share its GPUs; reserve nodes",
        ),
        (dict(penalty__alpha=-0.1), "penalty.alpha is -0.1, expected 0 or more"),
        (dict(penalty__alpha=float("nan")), "penalty.alpha is nan"),
        (dict(optimizer__lr=float("inf")), "optimizer.lr is inf"),
        (dict(rollout__temperature=0), "rollout.temperature is 0.0"),
        (dict(rollout__top_p=1.5), "rollout.top_p is 1.5, expected a number above 0 and at most 1"),
        (dict(rollout__top_k=0), "rollout.top_k is 0, expected -1 (off) or a number above 0"),
        (dict(policy__dual_clip=1), "policy.dual_clip is 1.0, expected null or a number above 1"),
        (dict(policy__clip_low=1.2), "policy.clip_low is 1.2"),
        (dict(policy__importance_cap=0), "policy.importance_cap is 0.0, expected null or a number above 0"),
        (dict(memory__min_cluster_size=1), "memory.min_cluster_size is 1, expected 2 or more"),
        (dict(advantage__std_floor=-0.1), "advantage.std_floor is -0.1, expected 0 or more"),
        (dict(optimizer__beta2=1), "optimizer.beta2 is 1.0, expected 0 or more and below 1"),
        (dict(model__path=None), "model.path is not set"),
        (dict(model__make="arithmetic"), "model.path is model, but model.make = arithmetic"),
        (dict(model__path=None, model__make="random"), "model.random.tokenizer is not set"),
        (
            dict(model__path=None, model__make="random", model__random__tokenizer="t", model__random__num_kv_heads=3),
            "model.random.num_heads = 4 is not a multiple",
        ),
        (dict(data__train=[]), "data.train is empty"),
        (dict(parallel__tensor=3), "make the number of ranks a multiple of 3"),
        (dict(parallel__sequence=True), "parallel.tensor = 1"),
        (dict(parallel__virtual_pipeline=2), "needs more than one pipeline stage"),
        (
            dict(cluster__device="cuda", rollout__engines=9),
            "rollout.engines = 9 engines of rollout.tensor = 1 GPUs are more than the 8 that fit cluster.nodes",
        ),
        (
            dict(cluster__device="cuda", rollout__engines=9, rollout__nodes=2, rollout__tensor=4),
            "more than the 4 that fit rollout.nodes x cluster.ranks_per_node = 2 x 8 GPUs",
        ),
        (dict(cluster__device="cuda", sync__transport="network"), "reserve nodes for the engines with rollout.nodes"),
        (
            dict(cluster__device="cuda", cluster__nodes=2, rollout__tensor=16),
            "rollout.tensor = 16 is more than the 8 ranks of a node",
        ),
        (dict(train__mini_batch_prompts=24), "512 is not a multiple of train.mini_batch_prompts = 24"),
        (dict(train__micro_batch_tokens=4000), "train.micro_batch_tokens = 4000 has no room for a sequence of"),
        (dict(train__forward_tokens=4000), "train.forward_tokens = 4000 has no room for a sequence of"),
        (
            dict(cluster__nodes=64, train__mini_batch_prompts=16, rollout__responses_per_prompt=16),
            "16 x 16 responses is smaller than the 512 data-parallel ranks",
        ),
        (dict(faults__hang_minutes=30.0), "faults.hang_minutes = 30.0 is not below cluster.collective_timeout_minutes"),
        (dict(rollout__responses_per_prompt=1), "rollout.responses_per_prompt is 1, expected 2 or more"),
        (dict(reward__overlong__buffer=0), "reward.overlong.buffer is 0, expected a number above 0"),
        (dict(reward__overlong__buffer=3072), "reward.overlong.buffer = 3072 is not below rollout.max_response_tokens"),
        (dict(rollout__top_p=0.9), "rollout.top_p = 0.9 with rollout.top_k = -1 normalises the sampled log-probs over"),
        (dict(rollout__top_k=20), "rollout.top_k = 20 normalises the sampled log-probs over the kept tokens only"),
        (
            dict(advantage__estimator="pass_at_k", advantage__pass_k=16),
            "advantage.pass_k = 16 is not below rollout.responses_per_prompt = 16",
        ),
        (
            dict(advantage__count_coefficient=0.2, penalty__target="none"),
            "advantage.count_coefficient = 0.2 needs the memory's counts, but penalty.target = none looks nothing up",
        ),
        (
            dict(policy__loss="gspo"),
            "policy.clip_high = 0.28 is a range of token ratios, but policy.loss = gspo clips ratios of whole "
            "responses; set policy.clip_low=3e-4 and policy.clip_high=4e-4.",
        ),
        (dict(policy__loss="gspo", policy__clip_high=4e-4), "policy.clip_low = 0.2 is a range of token ratios"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(settings, expected):
    with pytest.raises(UserError) as caught:
        validate(config_with(**settings))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("clip", [4e-4, 0.1])
def test_gspo_takes_ranges_of_response_ratios(clip):
    validate(config_with(policy__loss="gspo", policy__clip_low=clip, policy__clip_high=clip))


def test_without_cuda_engines_are_not_counted_against_ranks():
    validate(config_with(cluster__device="cpu", cluster__ranks_per_node=1, rollout__engines=2))


def test_the_overlong_buffer_is_not_checked_when_the_penalty_is_off():
    validate(config_with(reward__overlong__enabled=False, rollout__max_response_tokens=64))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(parallel__tensor=8), "28 attention heads cannot be divided over parallel.tensor = 8"),
        (dict(parallel__pipeline=8, parallel__virtual_pipeline=4), "28 layers are fewer than the model chunks of"),
        (dict(rollout__tensor=8), "28 attention heads cannot be divided over rollout.tensor = 8"),
        (dict(rollout__tensor=7), "rollout.tensor = 7 neither divides nor is a multiple of"),
        (dict(rollout__tensor=14), "neither divides nor is a multiple of"),
        (dict(rollout__max_prompt_tokens=2048), "= 5120 is more than the 4096 positions of the model"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_in_one_sentence(settings, expected):
    with pytest.raises(UserError) as caught:
        validate_model(config_with(**settings), MODEL)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (
            dict(ffn_size=18946),
            "the model's 18946 feed-forward columns cannot be divided over rollout.tensor = 4 ranks",
        ),
        (dict(vocab_size=30, num_heads=36, num_kv_heads=9, ffn_size=9), "64 vocabulary rows, rounded up, cannot be"),
    ],
)
def test_engines_divide_the_model_evenly(sizes, expected):
    tensor = 4 if "num_heads" not in sizes else 9
    with pytest.raises(UserError, match=expected):
        validate_model(config_with(rollout__tensor=tensor), replace(MODEL, **sizes))
