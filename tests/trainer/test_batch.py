"""From groups to flat arrays, and from cluster sizes to advantages."""

import math

import numpy as np
import pytest

from meds_megatron.actor.messages import ForwardResult
from meds_megatron.config import AdvantageConfig, PenaltyConfig
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.response import Response
from meds_megatron.trainer.batch import Batch
from meds_megatron.trainer.groups import PromptGroup


def group(name: str, correct: list[bool], boxed: list[int], prompt: int = 3) -> PromptGroup:
    """A group whose response i has i + 2 tokens."""
    return PromptGroup(
        Prompt(Problem(name, "?", "7", "test"), list(range(prompt))),
        [Response(0, list(range(i + 2)), [-1.0] * (i + 2), "", "stop", 0, boxed[i]) for i in range(len(correct))],
        [Grade(c, b >= 0, "graded") for c, b in zip(correct, boxed, strict=True)],
        [float(c) for c in correct],
    )


@pytest.fixture
def batch() -> Batch:
    groups = [group("a", [True, False, False], [0, 1, -1]), group("b", [False, True, False], [0, 0, 2], prompt=5)]
    return Batch.of_groups(groups, minibatch_prompts=1, data_parallel=2)


def test_arrays_follow_the_groups(batch):
    assert batch.keys == ["a|right", "a|wrong", "a|wrong", "b|wrong", "b|right", "b|wrong"]
    assert batch.data.response_lengths_B.tolist() == [2, 3, 4, 2, 3, 4]
    assert batch.data.answer_positions_B.tolist() == [3, 4, -1, 5, 5, 7]
    assert batch.data.minibatch_tokens_M.tolist() == [9, 9]
    assert batch.data.minibatch_responses_M.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("target", "rows"), [("wrong", [1, 3, 5]), ("right", [0, 4]), ("both", [0, 1, 3, 4, 5]), ("none", [])]
)
def test_only_targeted_responses_with_a_fingerprint_meet_the_memory(batch, target, rows):
    assert batch.targeted(target).tolist() == rows


def test_a_recurring_mistake_lowers_the_advantage_of_its_response_alone(batch):
    batch.shape(np.array([1, 3, 5]), np.array([3, 0, 100]), PenaltyConfig(target="wrong", alpha=0.1))
    shaped = [1, -0.1 * math.log(4), 0, 0, 1, -0.2]
    assert batch.shaped_scores_B == pytest.approx(shaped)
    batch.take_advantages(AdvantageConfig())
    for start in (0, 3):
        scores = np.array(shaped[start : start + 3])
        expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
        assert batch.data.advantages_B[start : start + 3] == pytest.approx(expected)


def test_results_of_ranks_return_to_their_responses(batch):
    results = []
    for rows, shard in zip(batch.rows, batch.shards(), strict=True):
        tokens_R = np.repeat(rows, shard.response_lengths_B).astype(np.float32)
        results.append(ForwardResult(tokens_R, -tokens_R, rows[:, None].astype(np.float32)))
    batch.take_forward(results)
    assert batch.data.logprobs_R.tolist() == np.repeat(np.arange(6), batch.data.response_lengths_B).tolist()
    assert batch.data.entropy_R.tolist() == (-batch.data.logprobs_R).tolist()
    assert batch.data.fingerprints_BL[:, 0].tolist() == list(range(6))


def test_a_step_may_have_no_groups_at_all():
    assert len(Batch.of_groups([], 4, 2).data) == 0
