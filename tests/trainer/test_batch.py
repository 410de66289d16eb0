"""From groups to flat arrays and back, and from shaped scores to advantages."""

import numpy as np
import pytest

from meds_megatron.actor.messages import ForwardReply
from meds_megatron.config import AdvantageConfig, Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.response import Response
from meds_megatron.trainer.batch import Batch
from meds_megatron.trainer.groups import PromptGroup, Sample
from meds_megatron.trainer.memory_keys import key_to_ask
from meds_megatron.trainer.memory_row import MemoryRow, StoredFingerprint


def group(name: str, correct: list[bool], boxed: list[int], prompt: int = 3, outcome: str = "graded") -> PromptGroup:
    """A group whose response i has i + 2 tokens."""
    asked = Prompt(Problem(name, "?", "7", "test"), list(range(prompt)))
    samples = [
        Sample(
            asked,
            Response(0, list(range(i + 2)), [-1.0] * (i + 2), "", "stop", 0, boxed[i]),
            Grade(correct[i], outcome),
            float(correct[i]),
        )
        for i in range(len(correct))
    ]
    return PromptGroup(asked, samples)


def two_groups() -> list[PromptGroup]:
    return [group("a", [True, False, False], [0, 1, -1]), group("b", [False, True, False], [0, 0, 2], prompt=5)]


@pytest.fixture
def batch() -> Batch:
    return Batch.of_groups(two_groups(), minibatch_prompts=1, data_parallel=2)


def test_arrays_follow_the_groups(batch):
    assert batch.data.response_lengths_B.tolist() == [2, 3, 4, 2, 3, 4]
    assert batch.data.answer_positions_B.tolist() == [3, 4, -1, 5, 5, 7]
    assert batch.data.minibatch_tokens_M.tolist() == [9, 9]
    assert batch.data.minibatch_responses_M.tolist() == [3, 3]
    assert batch.correct_B.tolist() == [True, False, False, False, True, False]


def test_others_change_nothing_about_the_groups(batch):
    others = group("c", [False, False, False, False], [0, 0, 0, 0]).samples
    more = Batch.of_groups(two_groups(), 1, 2, others)
    assert more.data.minibatches_B.tolist() == batch.data.minibatches_B.tolist() + [2, 2, 2, 2]
    assert more.data.minibatch_responses_M.tolist() == [3, 3, 4]
    for rows, alone in zip(more.rows, batch.rows, strict=True):
        assert rows[rows < 6].tolist() == alone.tolist()
    only_others = Batch.of_groups([], 1, 2, others)
    assert only_others.data.minibatches_B.tolist() == [0, 0, 0, 0]


def test_fingerprints_are_addressed_to_the_shards_that_own_them():
    groups = two_groups()
    groups[0].samples[1].memory_row = MemoryRow(0, "a|wrong", 3)
    groups[0].samples[2].memory_row = MemoryRow(1, "a|wrong|no_answer", 1)
    groups[1].samples[0].memory_row = MemoryRow(2, "b|wrong", 0)
    data = Batch.of_groups(groups, 1, 2).data
    assert data.memory_shards_B.tolist() == [-1, 3, -1, 0, -1, -1]
    assert data.memory_rows_B.tolist() == [-1, 0, -1, 2, -1, -1]


@pytest.mark.parametrize(
    ("target", "asked"),
    [("wrong", [1, 3, 5]), ("right", [0, 4]), ("both", [0, 1, 3, 4, 5]), ("none", [])],
)
def test_only_targeted_responses_with_a_fingerprint_meet_the_memory(batch, target, asked):
    config = Config()
    config.penalty.target = target
    keys = [key_to_ask(sample, config) for sample in batch.samples]
    named = ["a|right", "a|wrong", None, "b|wrong", "b|right", "b|wrong"]
    assert keys == [named[row] if row in asked else None for row in range(6)]


@pytest.mark.parametrize(("target", "met"), [("wrong", True), ("both", True), ("right", False), ("none", False)])
def test_wrong_answers_without_a_box_have_a_key_of_their_own_if_they_must_not_escape(target, met):
    config = Config()
    config.penalty.target, config.memory.no_answer = target, "own_cluster"
    right, wrong = group("a", [True, False], [-1, -1]).samples
    assert key_to_ask(wrong, config) == ("a|wrong|no_answer" if met else None)
    assert key_to_ask(right, config) is None


def test_what_could_not_be_graded_is_no_mistake():
    config = Config()
    config.memory.no_answer = "own_cluster"
    for outcome in ("timeout", "error"):
        samples = group("a", [False, False], [0, -1], outcome=outcome).samples
        assert [key_to_ask(sample, config) for sample in samples] == [None, None]


def test_the_floor_is_for_groups_without_a_right_answer():
    groups = [group("a", [True, False], [0, 0]), group("b", [False, False], [0, 0])]
    for sample, shaped in zip(groups[0].samples + groups[1].samples, (1.0, 0.9, 0.0, -0.1), strict=True):
        sample.shaped_score = shaped
    batch = Batch.of_groups(groups, 2, 1)
    batch.take_advantages(AdvantageConfig(std_floor=0.4))
    # The deviation is 0.1 / sqrt(2) in both.
    usual, floored = 0.05 / (0.1 / 2**0.5 + 1e-6), 0.05 / (0.4 + 1e-6)
    assert batch.data.advantages_B == pytest.approx([usual, -usual, floored, -floored])
    assert [sample.advantage for sample in batch.samples] == batch.data.advantages_B.tolist()


def test_replies_of_ranks_return_to_their_samples(batch):
    replies = []
    for rows, shard in zip(batch.rows, batch.shards(), strict=True):
        tokens_R = np.repeat(rows, shard.response_lengths_B).astype(np.float32)
        replies.append(ForwardReply(tokens_R, -tokens_R, f"rank with {rows.tolist()}", {}))
    batch.take_forward(replies)
    for row, sample in enumerate(batch.samples):
        rank = next(rank for rank, rows in enumerate(batch.rows) if row in rows)
        expected = StoredFingerprint(f"rank with {batch.rows[rank].tolist()}", batch.rows[rank].tolist().index(row))
        assert sample.fingerprint == (expected if row != 2 else None)
        assert sample.logprobs_R.tolist() == (-sample.entropy_R).tolist() == [row] * len(sample.response.token_ids)


def test_the_log_probs_of_measured_samples_are_in_the_data(batch):
    assert batch.data.logprobs_R is None
    for row, sample in enumerate(batch.samples):
        sample.logprobs_R = sample.entropy_R = np.full(len(sample.response.token_ids), row)
    again = Batch.of_groups([PromptGroup(None, batch.samples[3:]), PromptGroup(None, batch.samples[:3])], 1, 2)
    assert again.data.logprobs_R.tolist() == [3] * 2 + [4] * 3 + [5] * 4 + [0] * 2 + [1] * 3 + [2] * 4


def test_a_step_may_have_no_groups_at_all():
    batch = Batch.of_groups([], 4, 2)
    batch.take_advantages(AdvantageConfig())
    assert batch.samples == [] and len(batch.data) == 0
