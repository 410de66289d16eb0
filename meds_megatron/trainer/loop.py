"""The algorithm: MEDS, a step at a time."""

import logging

from meds_megatron.config import Config
from meds_megatron.rollout.producer import failed_gradings, first_failed_grading
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.checkpointer import Checkpointer
from meds_megatron.trainer.filtering import shortfall
from meds_megatron.trainer.protocols import Memory, Policy
from meds_megatron.trainer.report import (
    check_mismatch,
    check_updates,
    sampling_metrics,
    staleness_metrics,
    throughput_metrics,
    token_ages,
    training_metrics,
)
from meds_megatron.trainer.rollout_manager import RolloutManager
from meds_megatron.trainer.rollout_table import rollout_columns
from meds_megatron.trainer.scoring import score, training_batch
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.validation import validation_due, validation_metrics

logger = logging.getLogger(__name__)


def train(
    config: Config,
    state: TrainerState,
    rollout_manager: RolloutManager,
    policy: Policy,
    memory: Memory,
    checkpointer: Checkpointer,
    run: RunDirectory,
    log: RunLog,
    timer: PhaseTimer,
) -> None:
    """Trains from `state.step` to `train.steps`; the engines have the policy's weights already.

    Raises UserError when a step cannot be filled (`filter.when_short: stop`), when an engine fails too often, when
    trainer and engines disagree by more than `sync.max_logprob_difference`, and after `faults.max_bad_updates` updates
    in a row without a finite loss and gradient. Raises Stopped, between two steps, when a stop is requested, and
    RunFailed when a rank or shard died or nothing progresses.
    """
    overlaps = config.train.max_staleness > 0
    if not run.started and validation_due(0, config):
        log.log(0, validation_metrics(rollout_manager.validate(), config) | timer.take())

    while state.step < config.train.steps:
        state.step += 1
        # Rollout, reward and group filter, until the step is full.
        rollouts = rollout_manager.collect()

        # GPUs that engines share with the trainer are the trainer's until the engines get new weights. One forward pass
        # gives the old log-probs and the fingerprints, one lookup the earlier mistakes of the same kind: mistakes that
        # recur cost more.
        rollout_manager.free_gpus()
        if not rollouts.is_scored:
            score(rollouts, policy, memory, config, timer, rollout_manager.wait_for)
        batch, minibatches_B, advantage_metrics = training_batch(rollouts, config)

        # The memory remembers and reclusters while the policy learns and, with `train.max_staleness`, the engines
        # generate for later steps.
        memory.remember(*rollouts.lookup_arguments(rollouts.rows_to_remember(config), config))
        ages_R = token_ages(rollouts, state.policy_version)
        updates = []
        if len(batch):
            with timer("sync"):
                policy.restore_memory()
            with timer("update"):
                updates = rollout_manager.wait_for(policy.update(batch, minibatches_B, state.step - 1))
        rollout_manager.update_weights(updated=bool(updates))

        metrics = sampling_metrics(rollouts) | rollout_manager.metrics() | advantage_metrics
        metrics |= training_metrics(batch, updates, config.penalty.target, ages_R)
        metrics |= staleness_metrics(rollouts, batch, ages_R) if overlaps else {}
        if validation_due(state.step, config):
            metrics |= validation_metrics(rollout_manager.validate(), config)
        if export_due(state.step, config):
            with timer("export"):
                run.check_lock()
                policy.export(str(run.hf_export(state.step)))
        with timer("memory"):
            memory.wait()
            metrics |= memory.metrics()

        state.unfinished = rollout_manager.unfinished_prompts
        state.prompts_seen += len(rollouts.groups)
        state.tokens_seen += len(batch.rollout_logprobs_R)
        metrics |= {"progress/prompts": state.prompts_seen, "progress/tokens": state.tokens_seen} | timer.take()
        if sentence := shortfall(rollouts, config):
            logger.warning("step %d: %s: the step goes on with those", state.step, sentence)
        if failed := failed_gradings(rollouts.groups):
            logger.warning(
                "step %d: grading failed for %d responses, left out; the first: %s",
                state.step,
                failed,
                first_failed_grading(rollouts.groups),
            )
        if skipped := sum(update.skipped for update in updates):
            logger.warning("step %d: loss or gradient not finite: %d updates skipped", state.step, skipped)
        log.log(state.step, metrics | throughput_metrics(metrics, overlaps))
        columns = rollout_columns(rollouts, batch.advantages_B)
        log.log_responses(state.step, columns)
        if config.train.save_rollouts:
            run.save_rollouts(state.step, columns)
        state.bad_updates = check_updates(state.step, state.bad_updates, updates, config, run)
        check_mismatch(state.step, metrics, config)
        # Last: a step that a checkpoint holds has its metrics and rollouts.
        with timer("checkpoint"):
            checkpointer.step_finished(state)


def export_due(step: int, config: Config) -> bool:
    """Every `train.export_every` steps and after the last one."""
    every = config.train.export_every
    return config.train.export_hf and bool((every and step % every == 0) or step == config.train.steps)
