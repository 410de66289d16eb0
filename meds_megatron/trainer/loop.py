"""The algorithm: MEDS, a step at a time."""

from dataclasses import dataclass

from meds_megatron.config import Config
from meds_megatron.trainer.checkpointer import Checkpointer
from meds_megatron.trainer.collector import Collector
from meds_megatron.trainer.generation import Generation
from meds_megatron.trainer.gpus import Gpus
from meds_megatron.trainer.protocols import Memory, Policy
from meds_megatron.trainer.recorder import Recorder
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.training_batch import training_batch
from meds_megatron.trainer.validation import Validator


@dataclass(frozen=True)
class TrainingLoop:
    """The loop with the parts of a run that its steps use."""

    config: Config
    state: TrainerState
    collector: Collector
    generation: Generation
    policy: Policy
    memory: Memory
    gpus: Gpus
    validator: Validator
    recorder: Recorder
    checkpointer: Checkpointer

    def train(self) -> None:
        """Trains from `state.step` to `train.steps`; the engines have the policy's weights already.

        Raises UserError when a step cannot be filled (`filter.when_short: stop`), when an engine fails too often, and
        beyond the limits of `trainer.limits`. Raises Stopped, between two steps, when a stop is requested, and
        RunFailed when a rank or shard died or nothing progresses.
        """
        if self.validator.is_due(0) and not self.recorder.has_begun:
            self.recorder.validated(0, self.validator.validate())
        while self.state.step < self.config.train.steps:
            self.state.step += 1
            self.step()

    def step(self) -> None:
        """One training step."""
        state, policy, generation = self.state, self.policy, self.generation

        # Rollouts, rewards and the group filter, until the step is full. One forward pass gives the old log-probs and
        # the fingerprints, one lookup the number of earlier mistakes of the same cluster, by which a mistake costs
        # more.
        rollouts = self.collector.collect()
        batch = training_batch(rollouts, generation.policy_version, self.config)

        # The memory remembers and reclusters while the policy learns and, with `train.max_staleness`, the engines
        # generate for later steps.
        self.memory.remember(*rollouts.to_remember(self.config))
        with self.gpus.held_by_trainer():
            updates = []
            if len(batch):
                updates = generation.wait_for(policy.update(batch.responses, batch.minibatches_B, state.step - 1))
        generation.update_weights(updated=bool(updates))

        validation = self.validator.validate() if self.validator.is_due(state.step) else {}
        self.checkpointer.export_if_due(state.step)
        self.recorder.step_finished(state, rollouts, batch, updates, validation)
        # Last: a step that a checkpoint holds has its metrics and rollouts.
        self.checkpointer.step_finished()
