"""Records of a run's steps: metrics, warnings and rollout files."""

import logging
from collections.abc import Mapping

from meds_megatron.actor.train_batch import UpdateOutput
from meds_megatron.config import Config
from meds_megatron.rollout.producer import failed_gradings, first_failed_grading
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.filtering import shortfall
from meds_megatron.trainer.limits import check_mismatch, check_updates
from meds_megatron.trainer.protocols import Engines, Memory
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.rollout_table import rollout_columns
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.step_metrics import sampling_metrics, staleness_metrics, throughput_metrics, training_metrics
from meds_megatron.trainer.training_batch import StepBatch

logger = logging.getLogger(__name__)


class Recorder:
    """Writes the results of each step, and ends the run where a limit is exceeded (`trainer.limits`)."""

    def __init__(
        self, config: Config, run: RunDirectory, log: RunLog, engines: Engines, memory: Memory, timer: PhaseTimer
    ) -> None:
        self._config, self._run, self._log = config, run, log
        self._engines, self._memory, self._timer = engines, memory, timer
        self._overlaps = config.train.max_staleness > 0

    @property
    def has_begun(self) -> bool:
        """Whether the run has a line of metrics."""
        return self._run.started

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records a validation outside of a step."""
        self._log.log(step, dict(metrics) | self._timer.take())

    def step_finished(
        self,
        state: TrainerState,
        rollouts: RolloutBatch,
        batch: StepBatch,
        updates: list[UpdateOutput],
        validation: Mapping[str, float],
    ) -> None:
        """Records a step, `validation` being metrics of the policy after it. Raises UserError beyond a limit, when all
        is recorded."""
        state.prompts_seen += len(rollouts.groups)
        state.tokens_seen += len(batch.ages_R)
        metrics = self._metrics(state, rollouts, batch, updates, validation)
        self._warn(state.step, rollouts, updates)
        self._log.log(state.step, metrics)
        columns = rollout_columns(rollouts, batch.responses.advantages_B)
        self._log.log_responses(state.step, columns)
        if self._config.train.save_rollouts:
            self._run.save_rollouts(state.step, columns)
        state.bad_updates = check_updates(state.step, state.bad_updates, updates, self._config, self._run)
        check_mismatch(state.step, metrics, self._config)

    def _metrics(
        self,
        state: TrainerState,
        rollouts: RolloutBatch,
        batch: StepBatch,
        updates: list[UpdateOutput],
        validation: Mapping[str, float],
    ) -> dict[str, float]:
        metrics = sampling_metrics(rollouts) | self._engines.metrics() | batch.metrics
        if self._overlaps:
            metrics |= {"rollout/unfinished": len(state.unfinished)} | staleness_metrics(rollouts, batch)
        metrics |= training_metrics(batch, updates, self._config.penalty.target) | dict(validation)
        with self._timer("memory"):
            self._memory.wait()
            metrics |= self._memory.metrics()
        metrics |= {"progress/prompts": state.prompts_seen, "progress/tokens": state.tokens_seen} | self._timer.take()
        return metrics | throughput_metrics(metrics, len(rollouts.batch.rollout_logprobs_R), self._overlaps)

    def _warn(self, step: int, rollouts: RolloutBatch, updates: list[UpdateOutput]) -> None:
        if sentence := shortfall(rollouts, self._config):
            logger.warning("step %d: %s: the step trains on fewer prompts", step, sentence)
        if failed := failed_gradings(rollouts.groups):
            first = first_failed_grading(rollouts.groups)
            logger.warning("step %d: grading failed for %d responses, left out; the first: %s", step, failed, first)
        if skipped := sum(update.skipped for update in updates):
            logger.warning("step %d: loss or gradient not finite: %d updates skipped", step, skipped)
