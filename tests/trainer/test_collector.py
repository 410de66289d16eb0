"""Steps filled by the group filter, one that cannot be filled, and prompts that are generated ahead of their step."""

import signal
from concurrent.futures import Future

import numpy as np
import pytest

from meds_megatron.bench.simulation.parts import NoMemory
from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import Stopped, UserError
from meds_megatron.faults.interruption import Interruption
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample, Segment
from meds_megatron.trainer.filtering import shortfall
from meds_megatron.trainer.state import TrainerState
from tests.doubles import ScriptedCall, ScriptedEnginePool, ScriptedPolicy, ScriptedProducer, ScriptedWeightSync
from tests.trainer.training_parts import Parts

RESPONSES = 4


class CountedGroups:
    """Groups of which `right[i]` of the responses to prompt i are right, drawn by the current version of the weights.
    Of prompts named in `failing`, the gradings of the last two fail."""

    def __init__(self, right: list[int], failing: tuple[int, ...], weight_sync: ScriptedWeightSync):
        self._right, self._failing, self._weight_sync = right, failing, weight_sync

    def __call__(self, prompt: Prompt) -> PromptGroup:
        (index,) = prompt.token_ids
        tokens_R, logprobs_R = np.array([1, 2, 3]), np.zeros(3, np.float32)
        completion = Completion((Segment.drawn(tokens_R, logprobs_R, [(self._weight_sync.version, 0)]),), "", "stop")
        correct = [n < self._right[index] for n in range(RESPONSES)]
        samples = [Sample(prompt, completion, Grade(c, "graded"), float(c)) for c in correct]
        if index in self._failing:
            samples[2:] = [Sample(prompt, completion, Grade(False, "error"), np.nan)] * 2
        return PromptGroup(prompt, samples)


def parts_of(config, right, failing=(), unfinished=(), interruption=None) -> Parts:
    state = TrainerState(PromptSampler(len(right), seed=0, shuffle=False), step=1, unfinished=list(unfinished))
    prompts = [Prompt(Problem(str(i), "?", "7", "test"), [i]) for i in range(len(right))]
    weight_sync = ScriptedWeightSync()
    return Parts(
        config,
        state,
        prompts,
        ScriptedProducer(CountedGroups(right, failing, weight_sync)),
        ScriptedEnginePool(config),
        ScriptedPolicy(),
        weight_sync,
        NoMemory(),
        interruption or Interruption(),
    )


def submitted(producer: ScriptedProducer) -> list[int]:
    """Indices of the prompts, in order."""
    return [prompt.token_ids[0] for prompt in producer.submitted]


def config_of(wanted: int, **filter_settings) -> Config:
    config = Config()
    config.train.prompts_per_step = wanted
    config.rollout.responses_per_prompt = RESPONSES
    config.data.shuffle = False
    for name, value in filter_settings.items():
        setattr(config.filter, name, value)
    return config


def collected(right: list[int], failing: tuple[int, ...] = (), **settings):
    config = config_of(**settings)
    found = parts_of(config, right, failing).collector.collect()
    return found, shortfall(found, config)


def test_groups_without_spread_are_dropped_and_replaced():
    found, short = collected([0, 2, 4, 1, 3, 2], wanted=2, max_batches=3)
    assert [group.prompt.problem.id for group in found.kept_groups] == ["1", "3"]
    assert found.generation_batches == 2 and short is None


def test_failed_gradings_are_no_spread():
    found, short = collected([2, 1, 0], failing=(0, 1, 2), wanted=3, max_batches=1)
    assert [group.kept for group in found.groups] == [False, True, False]
    assert "gave 1 of 3 prompts" in short


def test_groups_beyond_the_step_are_not_trained_on():
    found, _ = collected([1, 2, 3, 1], wanted=3, generation_prompts=4)
    assert [group.kept for group in found.groups] == [True, True, True, False]


def test_a_short_step_goes_on_with_a_reason():
    found, short = collected([0, 1, 4, 4], wanted=2, max_batches=2)
    assert len(found.kept_groups) == 1
    assert "gave 1 of 2 prompts" in short


def test_a_short_step_stops_the_run_with_when_short_stop():
    with pytest.raises(UserError, match=r"filter\.max_batches"):
        collected([0, 4], wanted=2, max_batches=1, when_short="stop")


def test_without_a_filter_every_group_is_kept():
    found, _ = collected([0, 4], wanted=2, metric="none")
    assert len(found.kept_groups) == 2 and found.generation_batches == 1


def overlapping(wanted: int, staleness: int = 1, **filter_settings) -> Config:
    config = config_of(wanted, **filter_settings)
    config.train.max_staleness, config.train.mini_batch_prompts = staleness, 1
    return config


def test_prompts_of_later_steps_are_generated_ahead_and_late_groups_are_not_lost():
    config = overlapping(wanted=2, metric="none")
    parts = parts_of(config, [1] * 20)
    producer, policy, trained = parts.producer, parts.policy, []
    for version in range(4):
        parts.weight_sync.version = version
        rollouts = parts.collector.collect()
        assert rollouts.is_scored and len(rollouts.kept_groups) == 2
        trained += [int(group.prompt.problem.id) for group in rollouts.groups]
        assert len(parts.state.unfinished) == 2, "those of the next step"
    assert sorted([*trained, *parts.state.unfinished]) == list(range(10)) == sorted(submitted(producer))
    assert trained[:2] == [3, 2], "of four prompts the last were finished first"
    assert trained[2:4] == [1, 0], "the step whose deadline it is waits for the others, which are older than 4 and 5"
    assert policy.forwarded[:4] == [RESPONSES] * 4, "groups are scored as they finish"
    assert sum(policy.forwarded) == 8 * RESPONSES


def test_unfinished_prompts_of_a_checkpoint_are_generated_again_before_others():
    config = overlapping(wanted=2, metric="none")
    parts = parts_of(config, [1] * 20, unfinished=[17, 4, 11])
    parts.state.sampler.next(6)
    parts.collector.collect()
    assert submitted(parts.producer)[:4] == [17, 4, 11, 6]


def test_more_unfinished_prompts_than_the_schedule_has_room_for_stay_unfinished():
    config = config_of(wanted=2, metric="none")
    parts = parts_of(config, [1] * 20, unfinished=[17, 4, 11])
    producer = parts.producer
    parts.collector.collect()
    assert submitted(producer) == [17, 4] and parts.state.unfinished == [11]


def test_groups_finish_while_the_trainer_is_waited_for(monkeypatch):
    config = overlapping(wanted=2, metric="none")
    parts = parts_of(config, [1] * 20)
    producer = parts.producer
    parts.collector.collect()
    update: Future[None] = Future()
    advanced = producer.advance

    def advance(*others: Future) -> dict[int, PromptGroup]:
        assert others == (update,)
        update.set_result(None)
        return advanced()

    monkeypatch.setattr(producer, "advance", advance)
    assert parts.generation.wait_for(ScriptedCall("updates", (update,))) == "updates"
    assert producer.busy, "the call is done first"


def test_a_stop_is_honoured_even_if_all_groups_of_a_step_are_there():
    config, interruption = overlapping(wanted=2, metric="none"), Interruption()
    parts = parts_of(config, [1] * 20, interruption=interruption)
    producer = parts.producer
    parts.collector.collect()
    parts.generation.wait_for(ScriptedCall(None, (Future(),)))
    assert not producer.busy, "all groups finish while a call hangs"
    interruption.requested.set_result(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        parts.collector.collect()


def test_an_error_of_one_rank_is_raised_while_others_hang_and_requests_are_under_way():
    config = overlapping(wanted=2, metric="none")
    parts = parts_of(config, [1] * 20)
    producer = parts.producer
    parts.collector.collect()
    failed: Future[None] = Future()
    hangs: Future[None] = Future()
    failed.set_exception(UserError("rank 0 failed"))
    with pytest.raises(UserError, match="rank 0 failed"):
        parts.generation.wait_for(ScriptedCall(None, (failed, hangs)))
    assert producer.busy
