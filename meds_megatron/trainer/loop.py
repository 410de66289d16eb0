"""The algorithm: MEDS, a step at a time."""

from meds_megatron.trainer.batch import Batch
from meds_megatron.trainer.collect import collect
from meds_megatron.trainer.measure import measure
from meds_megatron.trainer.parts import Parts
from meds_megatron.trainer.report import report_step
from meds_megatron.trainer.state import RunState
from meds_megatron.trainer.validation import validate


def train(parts: Parts, state: RunState) -> None:
    """Trains from `state.step` to `train.steps`; `parts` are the machines and graders that do the work."""
    config, timer = parts.config, parts.timer
    if state.step == 0 and parts.validation_due(0):
        parts.report(0, validate(parts, step=0) | timer.take())

    while state.step < config.train.steps:
        state.step += 1
        metrics: dict[str, float] = {}

        # Rollout, reward and group filter, as often as it takes to fill the step.
        collected = collect(state, parts)
        # One forward pass gives the old log-probs and the fingerprints. How often was each mistake made before?
        # Mistakes that recur cost more. (A filter on the shaped score has measured already what it judged.)
        measure(collected.unmeasured, parts)
        batch = Batch.of_groups(collected.kept, config.train.mini_batch_prompts, parts.policy.layout.data)
        batch.take_advantages(config.advantage)

        # The memory remembers and reclusters while the policy learns.
        parts.memory.remember(collected.mistakes)
        updates = []
        if batch.samples:
            with timer("update"):
                updates = parts.policy.update(batch.shards(), state.step - 1)
            with timer("sync"):
                state.weights_version += 1
                parts.sync.update(state.weights_version)

        if parts.validation_due(state.step):
            metrics |= validate(parts, state.step)
        if parts.export_due(state.step):
            with timer("export"):
                parts.policy.export(str(parts.run.hf_export(state.step)))
        report_step(parts, state, collected, batch, updates, metrics)
