"""Responses to the problems of an evaluation, by all engines of a machine or Ray cluster, graded as they arrive."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from meds_megatron.cluster.ray_cluster import reserve_nodes
from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.errors import UserError
from meds_megatron.evaluation.settings import Dtype, EngineOptions
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling

REPORT_SECONDS = 10.0


def engine_config(model: Path, dtype: Dtype, longest_prompt: int, max_tokens: int, options: EngineOptions) -> Config:
    """The config of the engines and graders; `size_to_machine` completes it when Ray runs."""
    config = Config()
    config.model.path, config.model.dtype = str(model), dtype
    config.cluster.address, config.cluster.device = options.address, options.device
    rollout = config.rollout
    rollout.tensor, rollout.max_num_seqs, rollout.threads = options.tensor, options.max_num_seqs, options.threads or 1
    rollout.max_prompt_tokens, rollout.max_response_tokens = longest_prompt, max_tokens
    rollout.kv_cache_gib, rollout.enforce_eager = options.kv_cache_gib, options.enforce_eager
    config.reward.workers, config.reward.overlong.enabled = options.workers, False
    return config


def size_to_machine(config: Config, engines: int | None) -> None:
    """Sets nodes and engines: `engines`, or all that the connected cluster has GPUs for. Raises UserError for more."""
    import ray

    rollout, cluster = config.rollout, config.cluster
    if cluster.device != "cuda":
        rollout.engines, cluster.nodes, cluster.ranks_per_node = engines or 1, 1, (engines or 1) * rollout.tensor
        return
    gpus = sorted((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), reverse=True)
    gpus = [count for count in gpus if count >= rollout.tensor]
    per_node = gpus[-1] // rollout.tensor if gpus else 0
    available = per_node * len(gpus)
    if not available or (engines or 1) > available:
        raise UserError(
            f"{engines or 1} engines of {rollout.tensor} GPUs do not fit the Ray cluster, which has room for "
            f"{available}: lower --engines or --tensor"
        )
    rollout.engines = engines or available
    cluster.nodes = min(len(gpus), rollout.engines)
    cluster.ranks_per_node = -(-rollout.engines // cluster.nodes) * rollout.tensor


@contextmanager
def started_engines(config: Config, model: Path) -> Iterator[EnginePool]:
    """Engines with the weights in `model`. The caller has started Ray and called `size_to_machine`."""
    use_gpu = config.cluster.device == "cuda"
    placement = reserve_nodes(config, use_gpu, paths=[model])
    pool = EnginePool(config, str(model), use_gpu, placement, disk_version=0, evaluation=True)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()
        placement.close()


def generate(
    prompts: Sequence[Prompt],
    samplings: Sequence[Sampling],
    pool: EnginePool,
    graders: GraderPool,
    config: Config,
    finished: Callable[[int, PromptGroup], None],
) -> None:
    """Calls `finished` with the number and the graded responses of each prompt, in the order in which they are done.

    A line of progress goes to standard error every REPORT_SECONDS.
    """
    producer = GroupProducer(pool, graders, config)
    producer.submit(prompts, samplings)
    began = reported = time.monotonic()
    done = tokens = 0
    while producer.busy:
        for number, group in producer.advance().items():
            finished(number, group)
            done += 1
            tokens += sum(len(sample.completion.token_ids_S) for sample in group.samples)
        now = time.monotonic()
        if now - reported > REPORT_SECONDS:
            reported = now
            rate = tokens / (now - began)
            print(f"meds: {done} of {len(prompts)} problems, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
