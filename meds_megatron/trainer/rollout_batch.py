"""Prompt groups of a step and their responses as one TrainBatch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import Config
from meds_megatron.memory.features import answer_codes
from meds_megatron.rollout.samples import PromptGroup, Sample
from meds_megatron.trainer.error_memory import lookup_key


@dataclass
class RolloutBatch:
    """Groups in the order of generation; row i of `batch` is response i of theirs, one group after the other."""

    groups: list[PromptGroup]
    batch: TrainBatch
    keys_B: list[str | None]
    """Memory key of each response (`error_memory.lookup_key`)."""
    generation_batches: int = 1

    @classmethod
    def of_groups(cls, groups: list[PromptGroup], config: Config) -> "RolloutBatch":
        """Finished groups, none of them filtered yet."""
        samples = [sample for group in groups for sample in group.samples]
        batch = TrainBatch.of_responses(
            prompts=[sample.prompt.token_ids for sample in samples],
            responses=[sample.completion.token_ids_S for sample in samples],
            logprobs=[sample.completion.logprobs_R for sample in samples],
            answer_positions=[sample.completion.answer_position for sample in samples],
            groups=[number for number, group in enumerate(groups) for _ in group.samples],
            loss_masks=[sample.completion.loss_mask_S for sample in samples],
        )
        batch.correct_B = np.array([sample.grade.correct for sample in samples], dtype=bool)
        batch.scores_B = np.array([sample.score for sample in samples], dtype=np.float64)
        return cls(groups, batch, [lookup_key(sample, config) for sample in samples])

    @classmethod
    def joined(cls, parts: Sequence["RolloutBatch"], generation_batches: int) -> "RolloutBatch":
        """Several parts of a step as one; at least one."""
        layers = max((part.batch.fingerprints_BL.shape[1] for part in parts if part.is_scored), default=0)
        for part in parts:
            if part.is_scored and part.batch.fingerprints_BL.shape[1] < layers:
                # No response of this part went through the model: every grading failed.
                part.batch.fingerprints_BL = np.full((len(part.batch), layers), np.nan, dtype=np.float32)
        batch = TrainBatch.concatenate([part.batch for part in parts])
        groups = [group for part in parts for group in part.groups]
        batch.groups_B = np.repeat(np.arange(len(groups)), [len(group.samples) for group in groups])
        return cls(groups, batch, [key for part in parts for key in part.keys_B], generation_batches)

    @property
    def is_scored(self) -> bool:
        """Whether the forward pass and the memory's lookup are done."""
        return self.batch.fingerprints_BL is not None

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group.samples]

    @property
    def graded_B(self) -> np.ndarray:
        """Whether each response is known to be right or wrong."""
        return np.array([not sample.grade.failed for sample in self.samples], dtype=bool)

    @property
    def kept_B(self) -> np.ndarray:
        """Whether the group filter kept each response's group."""
        return np.array([group.kept for group in self.groups for _ in group.samples], dtype=bool)

    @property
    def trained_B(self) -> np.ndarray:
        """Whether each response is trained on: its group is kept and its grading did not fail."""
        return self.kept_B & self.graded_B

    @property
    def looked_up_B(self) -> np.ndarray:
        """Whether the error memory concerns each response."""
        return np.array([key is not None for key in self.keys_B], dtype=bool)

    @property
    def kept_groups(self) -> list[PromptGroup]:
        return [group for group in self.groups if group.kept]

    def rows_to_remember(self, config: Config) -> np.ndarray:
        """Responses that the error memory concerns: of kept groups, with `memory.remember_filtered` of all groups."""
        chosen_B = self.kept_B | config.memory.remember_filtered
        return np.array([row for row in np.flatnonzero(chosen_B) if self.keys_B[row] is not None], dtype=np.int64)

    def to_remember(self, config: Config) -> tuple[list[str], np.ndarray]:
        """Memory keys and vectors of what the error memory remembers of the step."""
        return self.lookup_arguments(self.rows_to_remember(config), config)

    def lookup_arguments(self, rows: np.ndarray, config: Config) -> tuple[list[str], np.ndarray]:
        """Memory keys of `rows` and what they are clustered by: fingerprints [N, L], with `memory.method: answer` the
        codes of final answers."""
        keys = [self.keys_B[row] for row in rows]
        if config.memory.method == "answer":
            samples = self.samples
            return keys, answer_codes([samples[row].final_answer for row in rows])
        return keys, self.batch.fingerprints_BL[rows]
