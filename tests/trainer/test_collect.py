"""The group filter in the driver: what is kept, how many, and what a run says when it cannot fill a step."""

from types import SimpleNamespace

import pytest

from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import UserError
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.response import Response
from meds_megatron.trainer.collect import collect
from meds_megatron.trainer.metrics import PhaseTimer
from meds_megatron.trainer.state import RunState

RESPONSES = 4


class ScriptedEngines:
    """Answers prompt i rightly in `right[i]` of its responses: engines whose accuracy a test can choose."""

    def __init__(self, right: list[int]):
        self._right = right

    def generate(self, prompts, sampling, seed):
        return [
            Response(index, [1, 2, 3], [0.0] * 3, f"\\boxed{{{7 if n < self._right[ids[0]] else 8}}}", "stop", 0)
            for index, ids in enumerate(prompts)
            for n in range(RESPONSES)
        ]


def collected(right: list[int], **settings):
    config = Config()
    config.train.prompts_per_step = settings.pop("wanted")
    config.rollout.responses_per_prompt = RESPONSES
    config.data.shuffle = False
    for name, value in settings.items():
        setattr(config.filter, name, value)
    with GraderPool(1, 5.0) as graders:
        parts = SimpleNamespace(
            config=config,
            prompts=[Prompt(Problem(str(i), "?", "7", "test"), [i]) for i in range(len(right))],
            engines=ScriptedEngines(right),
            graders=graders,
            timer=PhaseTimer(),
        )
        return collect(RunState(PromptSampler(len(right), seed=0, shuffle=False), step=1), parts)


def test_groups_without_spread_are_dropped_and_replaced():
    found = collected([0, 2, 4, 1, 3, 2], wanted=2, max_batches=3)
    assert [group.prompt.problem.id for group in found.kept] == ["1", "3"]
    assert found.batches == 2 and found.shortfall is None


def test_groups_beyond_the_step_are_not_trained_on():
    found = collected([1, 2, 3, 1], wanted=3, generation_prompts=4)
    assert [group.kept for group in found.groups] == [True, True, True, False]


def test_a_short_step_goes_on_and_says_so():
    found = collected([0, 1, 4, 4], wanted=2, max_batches=2)
    assert len(found.kept) == 1
    assert "gave 1 of 2 prompts" in found.shortfall


def test_a_short_step_stops_the_run_if_told_to():
    with pytest.raises(UserError, match="filter.max_batches"):
        collected([0, 4], wanted=2, max_batches=1, when_short="stop")


def test_without_a_filter_every_group_is_kept():
    found = collected([0, 4], wanted=2, metric="none")
    assert len(found.kept) == 2 and found.batches == 1
