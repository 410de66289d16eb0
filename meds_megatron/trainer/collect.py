"""Dynamic sampling: generate, grade and filter until a step has enough prompts worth learning from."""

from dataclasses import dataclass

import torch

from meds_megatron.algorithm.group_filter import keep_groups
from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.rollout.sampling import Sampling
from meds_megatron.trainer.groups import PromptGroup, grade_groups
from meds_megatron.trainer.measure import measure
from meds_megatron.trainer.memory_row import MemoryRow
from meds_megatron.trainer.parts import Parts
from meds_megatron.trainer.state import RunState


@dataclass
class Collected:
    """What one step generated."""

    groups: list[PromptGroup]
    """Every group, in the order of generation; `kept` tells which ones the step trains on."""
    batches: int
    config: Config

    @property
    def kept(self) -> list[PromptGroup]:
        return [group for group in self.groups if group.kept]

    @property
    def unmeasured(self) -> list[PromptGroup]:
        """What the step still needs a forward pass and a lookup of."""
        return [group for group in self._teaching if not group.measured]

    @property
    def mistakes(self) -> list[MemoryRow]:
        """What the memory is to remember of the step."""
        samples = [sample for group in self._teaching for sample in group.samples]
        return [sample.memory_row for sample in samples if sample.memory_row is not None]

    @property
    def _teaching(self) -> list[PromptGroup]:
        return [group for group in self.groups if group.kept or self.config.memory.remember_filtered]

    @property
    def shortfall(self) -> str | None:
        """Half a sentence when the step trains on fewer prompts than it should."""
        wanted = self.config.train.prompts_per_step
        if len(self.kept) == wanted:
            return None
        return (
            f"{self.batches} generation batches gave {len(self.kept)} of {wanted} prompts that pass the filter "
            f"(filter.metric={self.config.filter.metric})"
        )


def collect(state: RunState, parts: Parts) -> Collected:
    """Up to `train.prompts_per_step` groups for step `state.step`; groups beyond that are not trained on.

    Raises UserError when `filter.max_batches` generation batches do not fill the step and `filter.when_short` is stop.
    """
    config, timer = parts.config, parts.timer
    wanted = config.train.prompts_per_step
    groups: list[PromptGroup] = []
    missing, batches = wanted, 0
    while missing > 0 and batches < config.filter.max_batches:
        chosen = [parts.prompts[index] for index in state.sampler.next(config.filter.generation_prompts or wanted)]
        with timer("rollout"):
            seed = _seed(config.train.seed, state.step, batches)
            sampling = Sampling.training(config.rollout)
            responses = parts.engines.generate([prompt.token_ids for prompt in chosen], sampling, seed)
        with timer("reward"):
            found = grade_groups(chosen, responses, parts.graders, config)
        if config.filter.metric == "shaped":
            measure(found, parts)
        mark_kept(found, config, missing)
        groups += found
        missing -= sum(group.kept for group in found)
        batches += 1
    collected = Collected(groups, batches, config)
    if collected.shortfall and config.filter.when_short == "stop":
        raise UserError(
            f"Step {state.step}: {collected.shortfall}: raise filter.max_batches, or set filter.when_short to continue"
        )
    return collected


def mark_kept(groups: list[PromptGroup], config: Config, missing: int) -> None:
    """Keeps the first `missing` groups that the filter's metric can tell apart, and no other."""
    keep = [True] * len(groups)
    if config.filter.metric != "none":
        values = [group.accuracy if config.filter.metric == "accuracy" else group.shaped_scores for group in groups]
        metric_B = torch.tensor([value for of_group in values for value in of_group], dtype=torch.float64)
        groups_B = torch.tensor([number for number, of_group in enumerate(values) for _ in of_group])
        keep_B = keep_groups(metric_B, groups_B)
        keep = [bool(keep_B[groups_B == number].all()) for number in range(len(groups))]
    for group, wanted in zip(groups, keep, strict=True):
        group.kept = wanted and missing > 0
        missing -= group.kept


def _seed(run_seed: int, step: int, batch: int) -> int:
    """A seed of its own for every generation batch of a run."""
    return (run_seed * 1_000_003 + step) * 101 + batch
