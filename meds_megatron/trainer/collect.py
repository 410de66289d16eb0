"""Dynamic sampling: generate, grade and filter until a step has enough prompts to learn from."""

from collections.abc import Sequence
from typing import Literal

import torch

from meds_megatron.algorithm.group_filter import keep_groups
from meds_megatron.config import Config, FilterConfig
from meds_megatron.data.prompts import Prompt
from meds_megatron.errors import UserError
from meds_megatron.rollout.pool import EnginePool
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.rollout.samples import PromptGroup
from meds_megatron.rollout.settings import Sampling
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.interruption import Interruption
from meds_megatron.trainer.policy_group import PolicyGroup
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.scoring import score
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.timer import PhaseTimer
from meds_megatron.trainer.weight_sync import WeightSync


def collect(
    state: TrainerState,
    prompts: Sequence[Prompt],
    config: Config,
    producer: GroupProducer,
    weight_sync: WeightSync,
    pool: EnginePool,
    policy: PolicyGroup,
    memory: ErrorMemory,
    timer: PhaseTimer,
    interruption: Interruption,
) -> RolloutBatch:
    """Responses of step `state.step`, of which up to `train.prompts_per_step` groups are kept.

    Scored only with `filter.metric: shaped`, whose filter needs the scores. Raises UserError when `filter.max_batches`
    generation batches do not fill the step and `filter.when_short` is stop, and Stopped when a stop is requested.
    """
    wanted = config.train.prompts_per_step
    sampling = Sampling.training(config.rollout)
    parts: list[RolloutBatch] = []
    missing = wanted
    while missing > 0 and len(parts) < config.filter.max_batches:
        with timer("sync"):
            wake_engines("weights", pool, policy)
            wake_engines("kv_cache", pool, policy)
        chosen = [prompts[index] for index in state.sampler.next(config.filter.generation_prompts or wanted)]
        seed = generation_seed(config.train.seed, state.step, len(parts)) if config.rollout.deterministic else None
        producer.submit(chosen, sampling, seed)
        groups: list[PromptGroup] = []
        with timer("rollout"):
            while producer.generating:
                interruption.check()
                weight_sync.refill()
                groups += producer.advance(interruption.requested)
        # Most responses are graded while others are generated.
        with timer("reward"):
            while producer.busy:
                interruption.check()
                groups += producer.advance(interruption.requested)
        part = RolloutBatch.of_groups(in_order(groups), config)
        if config.filter.metric == "shaped":
            with timer("sync"):
                # Another generation batch may follow with the same weights.
                pool.sleep(keep_weights=True)
            score(part, policy, memory, config, timer)
        mark_kept(part, config.filter, missing)
        missing -= len(part.kept_groups)
        parts.append(part)
    rollouts = RolloutBatch.joined(parts)
    if config.filter.when_short == "stop" and (sentence := shortfall(rollouts, config)):
        raise UserError(
            f"Step {state.step}: {sentence}: raise filter.max_batches, or set filter.when_short to continue"
        )
    return rollouts


def wake_engines(part: Literal["weights", "kv_cache"], pool: EnginePool, policy: PolicyGroup) -> None:
    """Returns GPU memory to sleeping engines: for their weights before an update, for the KV cache after it. The
    trainer's gradients and, with `train.offload_optimizer`, its optimizer state make room first."""
    if pool.asleep:
        policy.free_memory()
        pool.wake(part)


def in_order(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """Groups in the order in which their prompts were submitted: they complete in any order."""
    return sorted(groups, key=lambda group: group.index)


def mark_kept(rollouts: RolloutBatch, config: FilterConfig, missing: int) -> None:
    """Keeps the first `missing` groups that have a spread in the filter's metric, and no other. Responses whose grading
    failed have no metric."""
    batch = rollouts.batch
    keep = [True] * len(rollouts.groups)
    if config.metric != "none":
        values_B = batch.correct_B if config.metric == "accuracy" else batch.shaped_scores_B
        keep_B = keep_groups(*map(torch.from_numpy, (values_B, batch.groups_B, rollouts.graded_B)))
        keep = [bool(keep_B[batch.groups_B == number].all()) for number in range(len(rollouts.groups))]
    for group, wanted in zip(rollouts.groups, keep, strict=True):
        group.kept = wanted and missing > 0
        missing -= group.kept


def shortfall(rollouts: RolloutBatch, config: Config) -> str | None:
    """Half a sentence when the step trains on fewer prompts than it should."""
    kept, wanted = len(rollouts.kept_groups), config.train.prompts_per_step
    if kept == wanted:
        return None
    return (
        f"{rollouts.generation_batches} generation batches gave {kept} of {wanted} prompts that pass the filter "
        f"(filter.metric={config.filter.metric})"
    )


def generation_seed(run_seed: int, step: int, batch: int) -> int:
    """A seed of its own for every generation batch of a run."""
    return (run_seed * 1_000_003 + step) * 101 + batch
