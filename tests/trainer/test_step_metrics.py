import math

import numpy as np
import pytest

from meds_megatron.actor.train_batch import TrainBatch, UpdateOutput
from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.errors import UserError
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample, Segment
from meds_megatron.run.checkpoint_files import mark_complete, write_state
from meds_megatron.run.directory import RunDirectory
from meds_megatron.trainer.limits import check_mismatch, check_updates
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.step_metrics import staleness_metrics, training_metrics, update_metrics
from meds_megatron.trainer.training_batch import StepBatch, training_batch

UPDATES = [
    UpdateOutput(1.5, {"tokens": 10.0, "kl": 0.0, "ratio": 10.0, "clip_fraction": 1.0}, 2.0, 1e-6, skipped=False),
    UpdateOutput(0.5, {"tokens": 30.0, "kl": 3.0, "ratio": 33.0, "clip_fraction": 6.0}, 4.0, 1e-6, skipped=False),
]
AGES_R = np.zeros(3, dtype=np.int64)


def batch(ages_R: np.ndarray = AGES_R) -> StepBatch:
    made = TrainBatch.of_responses([[1]] * 3, [[2]] * 3, [[-1.0]] * 3, [-1] * 3, [0, 0, 0])
    made.correct_B = np.array([False, False, True])
    made.scores_B = np.array([0.0, 0.0, 1.0])
    made.shaped_scores_B = np.array([-0.2, -0.3, 0.9])
    made.penalties_B = np.array([0.2, 0.3, 0.1])
    made.logprobs_R = np.array([-1.0, -1.5, -1.0], dtype=np.float32)
    made.entropy_R = np.array([0.1, 0.2, 0.3], dtype=np.float32)
    return StepBatch(made, np.zeros(3, dtype=np.int64), ages_R, {})


@pytest.mark.parametrize(("target", "mean"), [("wrong", 0.25), ("right", 0.1), ("both", 0.2), ("none", 0.0)])
def test_the_mean_penalty_is_that_of_the_targeted_responses(target, mean):
    assert training_metrics(batch(), UPDATES, target)["reward/penalty_mean"] == pytest.approx(mean)


def test_trainer_and_engine_are_compared_token_by_token():
    metrics = training_metrics(batch(), UPDATES, "wrong")
    assert metrics["mismatch/logprob_abs_max"] == pytest.approx(0.5)
    assert metrics["mismatch/logprob_abs_mean"] == pytest.approx(0.5 / 3)


def test_tokens_of_older_weights_are_no_mismatch():
    metrics = training_metrics(batch(np.array([0, 1, 0])), UPDATES, "wrong")
    assert metrics["mismatch/logprob_abs_max"] == 0
    assert "mismatch/logprob_abs_mean" not in training_metrics(batch(AGES_R + 1), UPDATES, "wrong")


def test_the_age_of_tokens_is_counted_from_the_weights_that_drew_each():
    prompt = Prompt(Problem("1", "?", "7", "test"), [1])
    grades = [Grade(True, "graded"), Grade(False, "graded"), Grade(False, "error")]
    versions = [((4, 0), (5, 2), (6, 3)), ((4, 0),), ((4, 0),)]
    samples = [
        Sample(
            prompt, Completion((Segment.drawn(np.arange(4), np.zeros(4, np.float32), changes),), "", "stop"), grade, 1.0
        )
        for changes, grade in zip(versions, grades, strict=True)
    ]
    rollouts = RolloutBatch.of_groups([PromptGroup(prompt, samples)], Config())
    rollouts.batch.shaped_scores_B = rollouts.batch.scores_B
    trained = training_batch(rollouts, 6, Config())
    assert trained.ages_R.tolist() == [2, 2, 1, 0, 2, 2, 2, 2]
    moved_R = np.array([0, 0, 0, 0.8, 0, 0, 0, 0.8], np.float32)
    trained.responses.logprobs_R = trained.responses.rollout_logprobs_R - moved_R
    assert staleness_metrics(rollouts, trained) == {
        "staleness/mean": pytest.approx(13 / 8),
        "staleness/max": 2,
        "staleness/mixed_share": 0.5,
        "staleness/logprob_abs_mean": pytest.approx(0.2),
    }


def test_every_metric_of_a_loss_is_reported_as_a_mean_over_tokens():
    metrics = update_metrics(UPDATES)
    assert metrics["policy/loss"] == pytest.approx(1.0) and metrics["policy/grad_norm"] == pytest.approx(3.0)
    assert metrics["policy/clip_fraction"] == pytest.approx((1 / 10 + 6 / 30) / 2)
    assert metrics["policy/kl"] == pytest.approx(0.05) and metrics["policy/kl_first_update"] == 0.0
    assert metrics["policy/updates"] == 2 and "policy/tokens" not in metrics


def skipped(loss: float = math.nan) -> UpdateOutput:
    return UpdateOutput(loss, {"tokens": 10.0, "kl": math.nan}, math.inf, 1e-6, skipped=True)


def test_skipped_updates_are_counted_and_left_out_of_the_means():
    metrics = update_metrics([skipped(), *UPDATES, skipped(math.inf)])
    expected = update_metrics(UPDATES)
    # The update that repeats the forward pass of the old log-probs was skipped.
    del expected["policy/kl_first_update"]
    assert metrics == expected | {"policy/skipped_updates": 2}
    assert update_metrics([skipped()]) == {"policy/updates": 0, "policy/skipped_updates": 1}
    assert all(map(math.isfinite, training_metrics(batch(), [*UPDATES, skipped()], "wrong").values()))


@pytest.mark.parametrize(
    ("before", "made", "count"),
    [(0, "", 0), (2, "", 2), (1, "ok", 0), (0, "x", 1), (1, "x", 2), (2, "ok x", 1), (0, "x ok", 0), (2, "ok x x", 2)],
)
def test_bad_updates_in_a_row_are_counted_from_step_to_step(before, made, count):
    updates = [UPDATES[0] if update == "ok" else skipped() for update in made.split()]
    assert check_updates(7, before, updates, Config(), RunDirectory("unused")) == count


@pytest.mark.parametrize(("before", "made"), [(0, "x x x"), (2, "x ok"), (1, "x x ok ok"), (2, "ok x x x ok")])
def test_bad_updates_in_a_row_stop_the_run_with_the_last_checkpoint(before, made, tmp_path):
    updates = [UPDATES[0] if update == "ok" else skipped() for update in made.split()]
    run = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"Step 7: .* 3 updates in a row .*, and start again: there is no checkpoint$"):
        check_updates(7, before, updates, Config(), run)
    for step in (2, 5, 6):
        run.checkpoint(step).mkdir(parents=True)
        write_state(run.checkpoint(step), {"step": step}, 0, {})
        if step < 6:
            mark_complete(run.checkpoint(step))
    with pytest.raises(UserError, match=f"lower optimizer.lr, and continue from {run.checkpoint(5)}$"):
        check_updates(7, before, updates, Config(), run)


def test_a_step_that_trains_on_nothing_reports_no_training_metrics():
    nothing = StepBatch(batch().responses.select(np.zeros(0, dtype=np.int64)), np.zeros(0), AGES_R[:0], {})
    assert training_metrics(nothing, [], "wrong") == {}


def test_engines_that_differ_too_much_stop_the_run():
    config = Config()
    metrics = {"mismatch/logprob_abs_mean": 0.02}
    check_mismatch(3, metrics, config)
    config.sync.max_logprob_difference = 0.01
    with pytest.raises(UserError, match=r"Step 3: trainer and engine log-probs differ by 0\.02 .* = 0\.01"):
        check_mismatch(3, metrics, config)
