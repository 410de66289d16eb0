"""Checks made before anything starts: of the config alone, and of the config against the model it names."""

import math
import operator
from dataclasses import fields, is_dataclass
from typing import Any

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import VLLM_VOCABULARY_MULTIPLE, ModelShape
from meds_megatron.config.schema import Config
from meds_megatron.errors import UserError

BOUNDS = {
    "gt": (operator.gt, "a number above {}"),
    "ge": (operator.ge, "{} or more"),
    "lt": (operator.lt, "below {}"),
    "le": (operator.le, "at most {}"),
}
"""Each bound of `schema.setting`: its test and its wording."""
GSPO_CLIP_LIMIT = 0.1
"""Clip ranges of whole responses' ratios lie far below it, those of tokens' ratios above."""


def validate(config: Config) -> None:
    """UserError, in one sentence, for the first setting that no model can be trained with."""
    _check_ranges(config, "")
    _require(
        config.name not in ("", ".", "..") and "/" not in config.name and config.name.isprintable(),
        f"name is {config.name!r}, expected the name of a directory: printable, without a slash",
    )
    _check_model_source(config)
    _check_ranks(config)
    _check_batches(config)
    _check_rollout(config)
    _check_advantage(config)
    _check_loss(config)


def validate_model(config: Config, model: ModelShape) -> None:
    """UserError, in one sentence, for the first setting that does not fit `model`."""
    ParallelLayout.from_config(config).check_model(model)
    rollout = config.rollout
    _require(
        model.num_kv_heads % rollout.tensor == 0 or rollout.tensor % model.num_kv_heads == 0,
        f"rollout.tensor = {rollout.tensor} neither divides nor is a multiple of the model's {model.num_kv_heads} "
        "key/value heads; choose a rollout.tensor that does",
    )
    vocabulary = -(-model.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
    for size, name in (
        (model.num_heads, "attention heads"),
        (model.ffn_size, "feed-forward columns"),
        (vocabulary, "vocabulary rows, rounded up,"),
    ):
        _require(
            size % rollout.tensor == 0,
            f"the model's {size} {name} cannot be divided over rollout.tensor = {rollout.tensor} ranks; "
            f"choose a rollout.tensor that divides {size}",
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    _require(
        longest <= model.max_positions,
        f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} is more than the {model.max_positions} "
        "positions of the model (max_position_embeddings); shorten one of them",
    )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(f"{otherwise}.")


def _check_ranges(section: Any, prefix: str) -> None:
    """Every number of `section` is finite and within the bounds of its key in the schema."""
    for field in fields(section):
        value, bounds = getattr(section, field.name), field.metadata.get("bounds", {})
        if is_dataclass(value):
            _check_ranges(value, f"{prefix}{field.name}.")
        elif bounds and value is not None and value != bounds.get("off"):
            tests = [BOUNDS[name][0](value, bound) for name, bound in bounds.items() if name != "off"]
            if not (math.isfinite(value) and all(tests)):
                raise UserError(f"{prefix}{field.name} is {value}, expected {_describe_range(field)}.")


def _describe_range(field: Any) -> str:
    bounds = field.metadata.get("bounds", {})
    wording = " and ".join(BOUNDS[name][1].format(bound) for name, bound in bounds.items() if name != "off")
    if "off" in bounds:
        return f"{bounds['off']} (off) or {wording}"
    return f"null or {wording}" if type(None) in getattr(field.type, "__args__", ()) else wording


def _check_model_source(config: Config) -> None:
    model, random = config.model, config.model.random
    if model.make == "no":
        _require(bool(model.path), "model.path is not set; give it a Hugging Face directory, or set model.make")
    else:
        _require(
            model.path is None,
            f"model.path is {model.path}, but model.make = {model.make} generates the model; leave one of them out",
        )
    if model.make == "random":
        _require(
            bool(random.tokenizer),
            "model.random.tokenizer is not set; model.make = random needs a directory of tokenizer files",
        )
        _require(
            random.num_heads % random.num_kv_heads == 0,
            f"model.random.num_heads = {random.num_heads} is not a multiple of "
            f"model.random.num_kv_heads = {random.num_kv_heads}; change one of them",
        )
    _require(bool(config.data.train), "data.train is empty; name the jsonl or parquet files to train on")


def _check_ranks(config: Config) -> None:
    parallel, cluster, rollout, hang = config.parallel, config.cluster, config.rollout, config.faults.hang_minutes
    _require(
        hang is None or hang < cluster.collective_timeout_minutes,
        f"faults.hang_minutes = {hang} is not below cluster.collective_timeout_minutes = "
        f"{cluster.collective_timeout_minutes}, after which the ranks of a hanging run are aborted; lower the first or "
        "raise the second",
    )
    ParallelLayout.from_config(config)
    _require(
        not parallel.sequence or parallel.tensor > 1,
        "parallel.sequence = true divides sequences over tensor-parallel ranks, but parallel.tensor = 1; raise "
        "parallel.tensor or set parallel.sequence=false",
    )
    _require(
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs more than one pipeline stage; raise "
        "parallel.pipeline or set parallel.virtual_pipeline=1",
    )
    _require(
        cluster.nodes == 1 or cluster.ranks_per_node % parallel.tensor == 0,
        f"parallel.tensor = {parallel.tensor} does not divide cluster.ranks_per_node = {cluster.ranks_per_node}, but a "
        "tensor-parallel group cannot span nodes; choose a parallel.tensor that does",
    )
    if cluster.device != "cuda":
        return
    key = "cluster.nodes" if rollout.nodes is None else "rollout.nodes"
    nodes = rollout.nodes or cluster.nodes
    _require(
        rollout.tensor <= cluster.ranks_per_node,
        f"rollout.tensor = {rollout.tensor} is more than the {cluster.ranks_per_node} ranks of a node, but an engine "
        "cannot span nodes; lower rollout.tensor",
    )
    engines = nodes * (cluster.ranks_per_node // rollout.tensor)
    _require(
        rollout.engines <= engines,
        f"rollout.engines = {rollout.engines} engines of rollout.tensor = {rollout.tensor} GPUs are more than the "
        f"{engines} that fit {key} x cluster.ranks_per_node = {nodes} x {cluster.ranks_per_node} GPUs; lower one",
    )
    _require(
        rollout.nodes is not None or config.sync.transport != "network",
        "sync.transport = network connects trainer ranks and engines by NCCL, which does not support two ranks on one "
        "GPU; reserve nodes for the engines with rollout.nodes, or set sync.transport=auto",
    )


def _check_batches(config: Config) -> None:
    train, layout = config.train, ParallelLayout.from_config(config)
    _require(
        train.prompts_per_step % train.mini_batch_prompts == 0,
        f"train.prompts_per_step = {train.prompts_per_step} is not a multiple of "
        f"train.mini_batch_prompts = {train.mini_batch_prompts}; change one of them",
    )
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    longest = -(-longest // layout.sequence_multiple) * layout.sequence_multiple
    for key in ("micro_batch_tokens", "forward_tokens"):
        _require(
            getattr(train, key) >= longest,
            f"train.{key} = {getattr(train, key)} has no room for a sequence of rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}; raise it to that or more",
        )
    responses = train.mini_batch_prompts * config.rollout.responses_per_prompt
    _require(
        responses >= layout.data,
        f"a mini-batch of train.mini_batch_prompts x rollout.responses_per_prompt = {train.mini_batch_prompts} x "
        f"{config.rollout.responses_per_prompt} responses is smaller than the {layout.data} data-parallel ranks; "
        "enlarge it",
    )


def _check_rollout(config: Config) -> None:
    rollout, overlong, staleness = config.rollout, config.reward.overlong, config.train.max_staleness
    _require(
        staleness == 0 or not rollout.deterministic,
        f"train.max_staleness = {staleness} trains on groups in the order in which they finish, which "
        "rollout.deterministic = true cannot repeat; set rollout.deterministic=false",
    )
    _require(
        staleness == 0 or config.cluster.device != "cuda" or rollout.nodes is not None,
        f"train.max_staleness = {staleness} generates while the trainer computes, but engines share its GPUs; reserve "
        "nodes for the engines with rollout.nodes",
    )
    _require(
        rollout.top_p == 1 and rollout.top_k == -1,
        f"rollout.top_p = {rollout.top_p} with rollout.top_k = {rollout.top_k} normalises the sampled log-probs over "
        "the kept tokens only, which biases the importance ratios; train with rollout.top_p=1 and rollout.top_k=-1",
    )
    _require(
        not overlong.enabled or overlong.buffer < rollout.max_response_tokens,
        f"reward.overlong.buffer = {overlong.buffer} is not below "
        f"rollout.max_response_tokens = {rollout.max_response_tokens}; change it or set reward.overlong.enabled=false",
    )


def _check_advantage(config: Config) -> None:
    advantage, responses = config.advantage, config.rollout.responses_per_prompt
    _require(
        advantage.estimator != "pass_at_k" or advantage.pass_k < responses,
        f"advantage.pass_k = {advantage.pass_k} is not below rollout.responses_per_prompt = {responses}, so the sets "
        "of a group could not differ; lower the first or raise the second",
    )
    _require(
        advantage.count_coefficient == 0 or config.penalty.target != "none",
        f"advantage.count_coefficient = {advantage.count_coefficient} needs the memory's counts, but penalty.target = "
        "none looks nothing up; set penalty.target=both, with penalty.alpha=0 for counts without a penalty",
    )


def _check_loss(config: Config) -> None:
    if config.policy.loss != "gspo":
        return
    for key in ("clip_high", "clip_low"):
        value = getattr(config.policy, key)
        _require(
            value <= GSPO_CLIP_LIMIT,
            f"policy.{key} = {value} is a range of token ratios, but policy.loss = gspo clips ratios of whole "
            "responses; set policy.clip_low=3e-4 and policy.clip_high=4e-4",
        )
