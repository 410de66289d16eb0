"""What can be judged before anything starts: the config alone, then the config against the model it names."""

import math
from functools import reduce
from typing import Any, Protocol

from meds_megatron.config.layout import ModelSizes, ParallelLayout
from meds_megatron.config.schema import Config
from meds_megatron.errors import UserError

POSITIVE = (
    "cluster.nodes",
    "cluster.ranks_per_node",
    "cluster.threads_per_rank",
    "cluster.collective_timeout_minutes",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "data.limit_train",
    "data.limit_validation",
    "rollout.engines",
    "rollout.tensor",
    "rollout.nodes",
    "rollout.max_prompt_tokens",
    "rollout.max_response_tokens",
    "rollout.temperature",
    "rollout.validation_responses",
    "rollout.cpu_kv_cache_gib",
    "rollout.threads",
    "rollout.max_num_seqs",
    "reward.workers",
    "reward.timeout_seconds",
    "memory.min_samples",
    "memory.knn",
    "memory.last_n_layers",
    "memory.window",
    "memory.half_life_steps",
    "memory.budget_gib",
    "filter.max_batches",
    "advantage.epsilon",
    "advantage.entropy_bound",
    "policy.clip_high",
    "policy.importance_cap",
    "optimizer.epsilon",
    "train.steps",
    "train.prompts_per_step",
    "train.mini_batch_prompts",
    "train.micro_batch_responses",
    "filter.generation_prompts",
    "model.random.hidden_size",
    "model.random.num_layers",
    "model.random.num_heads",
    "model.random.num_kv_heads",
    "model.random.head_dim",
    "model.random.ffn_size",
)
NOT_NEGATIVE = (
    "train.seed",
    "model.random.boxing_steps",
    "rollout.validation_temperature",
    "rollout.max_failures",
    "reward.overlong.factor",
    "penalty.alpha",
    "advantage.std_floor",
    "advantage.entropy_coefficient",
    "optimizer.lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "train.validate_every",
    "train.export_every",
    "sync.checksum_every",
    "sync.max_logprob_difference",
)
SHARES = ("rollout.top_p", "rollout.validation_top_p", "rollout.gpu_memory_utilization", "policy.clip_low")


class TrainableModel(ModelSizes, Protocol):
    """What a config is judged against; `meds_megatron.config.model_shape.ModelShape` is one."""

    max_positions: int
    vocab_size: int


def validate(config: Config) -> None:
    """UserError, in one sentence, for the first setting that cannot work whatever the model is."""
    _check_numbers(config)
    _check_model_source(config)
    _check_ranks(config)
    _check_batches(config)
    _check_rollout(config)


def validate_model(config: Config, model: TrainableModel) -> None:
    """UserError, in one sentence, for the first setting that does not fit `model`."""
    ParallelLayout.from_config(config).check_model(model)
    rollout = config.rollout
    _require(
        model.num_heads % rollout.tensor == 0,
        f"the model's {model.num_heads} attention heads cannot be shared by rollout.tensor = {rollout.tensor} ranks",
        f"choose a rollout.tensor that divides {model.num_heads}",
    )
    _require(
        model.num_kv_heads % rollout.tensor == 0 or rollout.tensor % model.num_kv_heads == 0,
        f"rollout.tensor = {rollout.tensor} neither divides nor is a multiple of the model's {model.num_kv_heads} "
        "key/value heads",
        "choose a rollout.tensor that is",
    )
    # vLLM rounds the vocabulary up before it shares it out.
    rows = _rounded_up(model.vocab_size, 64)
    for size, what in ((model.ffn_size, "feed-forward columns"), (rows, "vocabulary rows, rounded up,")):
        _require(
            size % rollout.tensor == 0,
            f"the model's {size} {what} cannot be shared by rollout.tensor = {rollout.tensor} ranks",
            f"choose a rollout.tensor that divides {size}",
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    _require(
        longest <= model.max_positions,
        f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} is more than the {model.max_positions} "
        "positions of the model (max_position_embeddings)",
        "shorten one of them",
    )


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _require(holds: bool, problem: str, remedy: str) -> None:
    if not holds:
        raise UserError(f"{problem}; {remedy}.")


def _value(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _check_numbers(config: Config) -> None:
    """Every number lies in its range; an optional one may be null."""

    def check(key: str, holds: bool, expected: str) -> None:
        value = _value(config, key)
        if value is not None and not (holds and math.isfinite(value)):
            raise UserError(f"{key} is {value}, expected {expected}.")

    for key in POSITIVE:
        check(key, (_value(config, key) or 0) > 0, "a number above 0")
    for key in NOT_NEGATIVE:
        check(key, (_value(config, key) or 0) >= 0, "0 or more")
    for key in SHARES:
        check(key, 0 < _value(config, key) <= 1, "a number above 0 and at most 1")
    for key in ("optimizer.beta1", "optimizer.beta2"):
        check(key, 0 <= _value(config, key) < 1, "a number from 0 to below 1")
    top_k = config.rollout.top_k
    check("rollout.top_k", top_k == -1 or top_k > 0, "-1 (off) or a number above 0")
    check("memory.min_cluster_size", config.memory.min_cluster_size >= 2, "2 or more")
    check("policy.dual_clip", (config.policy.dual_clip or 0) > 1, "null (off) or a number above 1")


def _check_model_source(config: Config) -> None:
    model, random = config.model, config.model.random
    if model.make == "no":
        _require(bool(model.path), "model.path is not set", "give it a Hugging Face directory, or set model.make")
    else:
        _require(
            model.path is None,
            f"model.path is {model.path} although model.make = {model.make} makes the model on the spot",
            "leave one of them out",
        )
    if model.make == "random":
        _require(
            bool(random.tokenizer),
            "model.random.tokenizer is not set, which model.make = random needs",
            "give it a directory with tokenizer files",
        )
        _require(
            random.num_kv_heads > 0 and random.num_heads % random.num_kv_heads == 0,
            f"model.random.num_heads = {random.num_heads} is not a multiple of "
            f"model.random.num_kv_heads = {random.num_kv_heads}",
            "change one of them",
        )
    _require(bool(config.data.train), "data.train is empty", "name the jsonl or parquet files to train on")


def _check_ranks(config: Config) -> None:
    parallel, cluster, rollout = config.parallel, config.cluster, config.rollout
    ParallelLayout.from_config(config)
    _require(
        not parallel.sequence or parallel.tensor > 1,
        "parallel.sequence = true shares sequences over tensor-parallel ranks, but parallel.tensor = 1",
        "raise parallel.tensor or turn parallel.sequence off",
    )
    _require(
        parallel.virtual_pipeline == 1 or parallel.pipeline > 1,
        f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs more than one pipeline stage",
        "raise parallel.pipeline or set parallel.virtual_pipeline=1",
    )
    if cluster.device != "cuda":
        return
    key = "cluster.nodes" if rollout.nodes is None else "rollout.nodes"
    nodes = rollout.nodes or cluster.nodes
    _require(
        rollout.tensor <= cluster.ranks_per_node,
        f"rollout.tensor = {rollout.tensor} would spread an engine over nodes of {cluster.ranks_per_node} ranks",
        "lower rollout.tensor",
    )
    engines = nodes * (cluster.ranks_per_node // rollout.tensor)
    _require(
        rollout.engines <= engines,
        f"rollout.engines = {rollout.engines} engines of rollout.tensor = {rollout.tensor} GPUs are more than the "
        f"{engines} that {key} x cluster.ranks_per_node = {nodes} x {cluster.ranks_per_node} GPUs hold",
        "lower one of them",
    )
    _require(
        rollout.nodes is not None or config.sync.transport != "network",
        "sync.transport = network connects trainer ranks and engines by NCCL, which does not let them share a GPU",
        "give the engines nodes of their own with rollout.nodes, or set sync.transport=auto",
    )


def _check_batches(config: Config) -> None:
    train, layout = config.train, ParallelLayout.from_config(config)
    _require(
        train.prompts_per_step % train.mini_batch_prompts == 0,
        f"train.prompts_per_step = {train.prompts_per_step} is not a multiple of "
        f"train.mini_batch_prompts = {train.mini_batch_prompts}",
        "change one of them",
    )
    responses = train.mini_batch_prompts * config.rollout.responses_per_prompt
    share = train.micro_batch_responses * layout.data
    sizes = f"train.micro_batch_responses x data-parallel ranks = {train.micro_batch_responses} x {layout.data}"
    batch = (
        f"a mini-batch of train.mini_batch_prompts x rollout.responses_per_prompt = {train.mini_batch_prompts} x "
        f"{config.rollout.responses_per_prompt} responses"
    )
    _require(responses >= share, f"{batch} is smaller than {sizes}", "enlarge it or use smaller micro-batches")
    _require(responses % share == 0, f"{batch} is not a multiple of {sizes}", "change one of them")
    micro_batches = responses // share
    _require(
        layout.virtual == 1 or micro_batches % layout.pipeline == 0,
        f"the interleaved schedule of parallel.virtual_pipeline = {layout.virtual} needs a multiple of "
        f"parallel.pipeline = {layout.pipeline} micro-batches a rank, but {batch} makes {micro_batches}",
        "change train.mini_batch_prompts or train.micro_batch_responses",
    )


def _check_rollout(config: Config) -> None:
    rollout, overlong = config.rollout, config.reward.overlong
    _require(
        rollout.responses_per_prompt >= 2,
        f"rollout.responses_per_prompt = {rollout.responses_per_prompt} leaves nothing to compare a response with",
        "set it to 2 or more",
    )
    _require(
        not overlong.enabled or 0 < overlong.buffer < rollout.max_response_tokens,
        f"reward.overlong.buffer = {overlong.buffer} must lie between 0 and "
        f"rollout.max_response_tokens = {rollout.max_response_tokens}",
        "change it or set reward.overlong.enabled=false",
    )
