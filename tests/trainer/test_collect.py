"""The group filter in the driver: which groups are kept, and a step that cannot be filled."""

from types import SimpleNamespace

import numpy as np
import pytest

from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import UserError
from meds_megatron.reward.grading import Grade
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample
from meds_megatron.trainer.collect import collect, shortfall
from meds_megatron.trainer.interruption import Interruption
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.timer import PhaseTimer

RESPONSES = 4


class ScriptedProducer:
    """Groups whose accuracy a test can choose: `right[i]` of the responses to prompt i are right. They complete one by
    one, the last prompt first. Of prompts named in `failing`, the gradings of the last two fail."""

    def __init__(self, right: list[int], failing: tuple[int, ...] = ()):
        self._right, self._failing, self._submitted = right, failing, {}

    def submit(self, prompts, sampling, seed):
        self._submitted = dict(enumerate(prompts))

    @property
    def busy(self):
        return bool(self._submitted)

    generating = busy

    def advance(self, *_):
        number, prompt = self._submitted.popitem()
        completion = Completion(np.array([1, 2, 3]), np.zeros(3, np.float32), "", "stop", 0)
        correct = [n < self._right[prompt.token_ids[0]] for n in range(RESPONSES)]
        samples = [Sample(prompt, completion, Grade(c, "graded"), float(c)) for c in correct]
        if prompt.token_ids[0] in self._failing:
            samples[2:] = [Sample(prompt, completion, Grade(False, "error"), np.nan)] * 2
        return [PromptGroup(prompt, samples, index=number)]


def collected(right: list[int], failing: tuple[int, ...] = (), **settings):
    config = Config()
    config.train.prompts_per_step = settings.pop("wanted")
    config.rollout.responses_per_prompt = RESPONSES
    config.data.shuffle = False
    for name, value in settings.items():
        setattr(config.filter, name, value)
    state = TrainerState(PromptSampler(len(right), seed=0, shuffle=False), step=1)
    prompts = [Prompt(Problem(str(i), "?", "7", "test"), [i]) for i in range(len(right))]
    weight_sync = SimpleNamespace(refill=lambda: None)
    pool = SimpleNamespace(asleep=False)
    found = collect(
        state,
        prompts,
        config,
        ScriptedProducer(right, failing),
        weight_sync,
        pool,
        None,
        None,
        PhaseTimer(),
        Interruption(),
    )
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
    found, short = collected([1, 2, 3, 1], wanted=3, generation_prompts=4)
    assert [group.kept for group in found.groups] == [True, True, True, False]


def test_a_short_step_goes_on_with_a_reason():
    found, short = collected([0, 1, 4, 4], wanted=2, max_batches=2)
    assert len(found.kept_groups) == 1
    assert "gave 1 of 2 prompts" in short


def test_a_short_step_stops_the_run_with_when_short_stop():
    with pytest.raises(UserError, match="filter.max_batches"):
        collected([0, 4], wanted=2, max_batches=1, when_short="stop")


def test_without_a_filter_every_group_is_kept():
    found, short = collected([0, 4], wanted=2, metric="none")
    assert len(found.kept_groups) == 2 and found.generation_batches == 1
