"""Flat arrays, memory keys and advantages of groups."""

from dataclasses import replace

import numpy as np
import pytest

from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample, Segment
from meds_megatron.trainer.error_memory import lookup_key
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.training_batch import training_batch


def drawn(tokens: int) -> Segment:
    return Segment.drawn(np.arange(tokens), np.full(tokens, -1.0, np.float32), [(0, 0)])


def group(name: str, correct: list[bool], answers: list[int], prompt: int = 3, outcome: str = "graded") -> PromptGroup:
    """A group whose response i has i + 2 tokens and its answer position at `answers[i]`."""
    asked = Prompt(Problem(name, "?", "7", "test"), list(range(prompt)))
    samples = [
        Sample(
            asked,
            Completion((drawn(i + 2),), "", "stop", answers[i]),
            Grade(correct[i], outcome),
            float(correct[i]),
        )
        for i in range(len(correct))
    ]
    return PromptGroup(asked, samples)


def two_groups() -> list[PromptGroup]:
    return [group("a", [True, False, False], [0, 1, -1]), group("b", [False, True, False], [0, 0, 2], prompt=5)]


@pytest.fixture
def rollouts() -> RolloutBatch:
    return RolloutBatch.of_groups(two_groups(), Config())


def test_arrays_follow_the_groups(rollouts):
    batch = rollouts.batch
    assert batch.response_lengths_B.tolist() == [2, 3, 4, 2, 3, 4]
    assert batch.answer_positions_B.tolist() == [3, 4, -1, 5, 5, 7]
    assert batch.groups_B.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.correct_B.tolist() == [True, False, False, False, True, False]
    assert batch.scores_B.tolist() == [1, 0, 0, 0, 1, 0]


def test_generation_batches_join_in_order(rollouts):
    third = RolloutBatch.of_groups([group("c", [False], [0])], Config())
    joined = RolloutBatch.joined([rollouts, third], generation_batches=2)
    assert [g.prompt.problem.id for g in joined.groups] == ["a", "b", "c"] and joined.generation_batches == 2
    assert joined.batch.groups_B.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert joined.keys_B == [None, "a|wrong", None, "b|wrong", None, "b|wrong", "c|wrong"]


def test_only_kept_groups_are_remembered_unless_filtered_ones_are_too(rollouts):
    config = Config()
    rollouts.groups[0].kept = False
    assert rollouts.rows_to_remember(config).tolist() == [3, 5]
    config.memory.remember_filtered = True
    assert rollouts.rows_to_remember(config).tolist() == [1, 3, 5]


@pytest.mark.parametrize(
    ("target", "chosen"),
    [("wrong", [1, 3, 5]), ("right", [0, 4]), ("both", [0, 1, 3, 4, 5]), ("none", [])],
)
def test_only_targeted_responses_with_an_answer_have_a_key(target, chosen):
    config = Config()
    config.penalty.target = target
    named = ["a|right", "a|wrong", None, "b|wrong", "b|right", "b|wrong"]
    assert RolloutBatch.of_groups(two_groups(), config).keys_B == [
        named[row] if row in chosen else None for row in range(6)
    ]


@pytest.mark.parametrize(("target", "has_key"), [("wrong", True), ("both", True), ("right", False), ("none", False)])
def test_wrong_responses_without_an_answer_have_a_key_of_their_own_with_own_cluster(target, has_key):
    config = Config()
    config.penalty.target, config.memory.no_answer = target, "own_cluster"
    right, wrong = group("a", [True, False], [-1, -1]).samples
    assert lookup_key(wrong, config) == ("a|wrong|no_answer" if has_key else None)
    assert lookup_key(right, config) is None


def test_a_response_whose_grading_failed_has_no_key():
    config = Config()
    config.memory.no_answer = "own_cluster"
    for outcome in ("timeout", "error"):
        samples = group("a", [False, False], [0, -1], outcome=outcome).samples
        assert [lookup_key(sample, config) for sample in samples] == [None, None]


def with_scores(rollouts: RolloutBatch, shaped: list[float]) -> RolloutBatch:
    rollouts.batch.shaped_scores_B = np.array(shaped)
    return rollouts


def failing(made: PromptGroup, *rows: int) -> PromptGroup:
    """The group with failed gradings of the responses `rows`."""
    for row in rows:
        made.samples[row].grade, made.samples[row].score = Grade(False, "timeout"), np.nan
    return made


def test_a_failed_grading_is_left_out_of_its_groups_deviation_and_of_the_loss():
    config = Config()
    groups = [failing(group("a", [True, False, False, False], [0] * 4), 3), group("b", [True, False], [0, 0])]
    rollouts = with_scores(RolloutBatch.of_groups(groups, config), [1.0, 0.0, 0.0, np.nan, 1.0, 0.0])
    step = training_batch(rollouts, 0, config)
    # Of scores 1, 0, 0 the mean is 1/3 and the deviation 1 / sqrt(3); of 1, 0 they are 1/2 and 1 / sqrt(2).
    three, two = 1 / 3**0.5 + 1e-6, 1 / 2**0.5 + 1e-6
    assert step.responses.advantages_B == pytest.approx(
        [2 / 3 / three, -1 / 3 / three, -1 / 3 / three, 0.5 / two, -0.5 / two]
    )
    assert step.minibatches_B.tolist() == [0] * 5
    assert step.responses.response_lengths_B.tolist() == [2, 3, 4, 2, 3]
    assert step.responses.loss_weights_B == pytest.approx([1 / 14] * 5)


def answering(made: PromptGroup, *answers: str) -> PromptGroup:
    """The group with these boxed answers."""
    for sample, answer in zip(made.samples, answers, strict=True):
        sample.completion = replace(sample.completion, text=f"so \\boxed{{{answer}}}")
    return made


def test_advantages_by_answer_see_equal_answers_in_any_spelling_and_leave_failed_gradings_out():
    config = Config()
    config.advantage.diversity_alpha = 0.4
    made = failing(answering(group("a", [True] + [False] * 4, [0] * 5), "7", "1/2", "0.50", "8", "9"), 4)
    rollouts = with_scores(RolloutBatch.of_groups([made], config), [1.0, 0.0, 0.0, 0.0, np.nan])
    step = training_batch(rollouts, 0, config)
    # Shares 2/3 and 1/3 of the three wrong answers, as in the baselines' test.
    assert step.responses.advantages_B == pytest.approx([1.5, -0.5420620, -0.5420620, -0.4158760], abs=1e-5)
    assert step.metrics == {"advantage/error_entropy": pytest.approx(0.6365142)}


def test_advantages_by_count_see_the_sizes_of_looked_up_responses_only():
    config = Config()
    config.advantage.count_coefficient, config.penalty.target = 0.2, "wrong"
    rollouts = with_scores(RolloutBatch.of_groups([group("a", [True, False], [0, 0])], config), [1.0, 0.0])
    rollouts.batch.cluster_sizes_B = np.array([0, 4])
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert training_batch(rollouts, 0, config).responses.advantages_B == pytest.approx([half, -half])
    rollouts.batch.cluster_sizes_B = np.array([0, 16])
    assert training_batch(rollouts, 0, config).responses.advantages_B == pytest.approx([half, -half - 0.2 * 0.25])


def test_the_memory_by_answer_is_given_answers_for_fingerprints(rollouts):
    config = Config()
    config.memory.method = "answer"
    answering(rollouts.groups[0], "7", "8", "9")
    answering(rollouts.groups[1], "8.0", "7", "\\text{8}")
    keys, codes_NC = rollouts.lookup_arguments(np.array([1, 3, 5]), config)
    assert keys == ["a|wrong", "b|wrong", "b|wrong"]
    assert (codes_NC == codes_NC[0]).all() and codes_NC.shape == (3, 3)


def test_a_group_whose_gradings_all_failed_trains_on_nothing():
    config = Config()
    config.train.mini_batch_prompts = 1
    groups = [failing(group("a", [False, False], [0, 0]), 0, 1), group("b", [True, False], [0, 0])]
    rollouts = with_scores(RolloutBatch.of_groups(groups, config), [np.nan, np.nan, 1.0, 0.0])
    assert rollouts.kept_B.all() and rollouts.trained_B.tolist() == [False, False, True, True]
    assert rollouts.keys_B == [None, None, None, "b|wrong"]
    step = training_batch(rollouts, 0, config)
    assert step.minibatches_B.tolist() == [0, 0] and step.responses.scores_B.tolist() == [1, 0]


def test_the_floor_is_for_groups_without_a_right_answer():
    config = Config()
    config.advantage.std_floor = 0.4
    groups = [group("a", [True, False], [0, 0]), group("b", [False, False], [0, 0])]
    step = training_batch(with_scores(RolloutBatch.of_groups(groups, config), [1.0, 0.9, 0.0, -0.1]), 0, config)
    # The deviation is 0.1 / sqrt(2) in both.
    usual, floored = 0.05 / (0.1 / 2**0.5 + 1e-6), 0.05 / (0.4 + 1e-6)
    assert step.responses.advantages_B == pytest.approx([usual, -usual, floored, -floored])
    assert step.minibatches_B.tolist() == [0] * 4


def test_loss_weights_are_those_of_the_whole_mini_batch(rollouts):
    config = Config()
    config.train.mini_batch_prompts = 1
    rollouts.groups.append(group("c", [False, True], [0, 0]))
    rollouts = RolloutBatch.of_groups(rollouts.groups, config)
    rollouts.groups[0].kept = False
    step = training_batch(with_scores(rollouts, [0.0] * 8), 0, config)
    assert step.minibatches_B.tolist() == [0, 0, 0, 1, 1]
    assert step.responses.loss_weights_B == pytest.approx([1 / 9] * 3 + [1 / 5] * 2)
    assert step.responses.loss_weights_B.dtype == np.float32


def test_a_step_may_keep_no_group_at_all(rollouts):
    for dropped in rollouts.groups:
        dropped.kept = False
    step = training_batch(with_scores(rollouts, [np.nan] * 6), 0, Config())
    assert len(step) == len(step.minibatches_B) == len(step.responses.advantages_B) == 0
