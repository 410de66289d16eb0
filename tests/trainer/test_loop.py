"""The loop with real shards, real routing of fingerprints and real grading; engines and policy are scripted."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from meds_megatron.actor.handover import hand_over
from meds_megatron.actor.messages import ForwardReply, ForwardResult, UpdateResult
from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.reward.grading import GraderPool
from meds_megatron.rollout.response import Response
from meds_megatron.trainer import loop
from meds_megatron.trainer.memory_group import MemoryGroup
from meds_megatron.trainer.metrics import PhaseTimer
from meds_megatron.trainer.rollout_columns import rollout_columns
from meds_megatron.trainer.state import RunState

LAYERS = 14
HABITS = "ABC"
"""Kinds of wrong answers that have a fingerprint."""


class ScriptedEngines:
    """Writes what `script(step, prompt)` says, a letter a response: R is right, u wrong without a box, others are
    wrong by a habit. A response's tokens name its habit and its place, so that no two fingerprints are equal."""

    def __init__(self, script: Callable[[int, int], str], state: RunState):
        self._script, self._state, self._drawn = script, state, 0

    def sleep(self) -> None:
        pass

    def generate(self, prompts, sampling, seed):
        return [
            self._response(index, letter)
            for index, ids in enumerate(prompts)
            for letter in self._script(self._state.step, ids[0])
        ]

    def _response(self, index: int, letter: str) -> Response:
        self._drawn += 1
        text = {"R": "\\boxed{7}", "u": "no idea"}.get(letter, "\\boxed{8}")
        return Response(index, [ord(letter), self._drawn], [0.0] * 2, text, "stop", 0, -1 if letter == "u" else 0)


class ScriptedPolicy:
    """Two data-parallel ranks whose fingerprints show the habit that a response's tokens name."""

    layout = SimpleNamespace(data=2)

    def __init__(self):
        self.forwarded: list[int] = []
        """Responses of each forward pass."""
        self.updated: list[int] = []

    def forward(self, shards) -> list[ForwardReply]:
        self.forwarded.append(sum(map(len, shards)))
        return [hand_over(self._result(data), data) for data in shards]

    def update(self, shards, step) -> list[list[UpdateResult]]:
        assert all(data.logprobs_R is not None and data.advantages_B is not None for data in shards)
        self.updated.append(sum(map(len, shards)))
        return []

    def _result(self, data) -> ForwardResult:
        zeros_R = np.zeros(len(data.rollout_logprobs_R), dtype=np.float32)
        tokens_B2 = data.tokens_T.reshape(-1, 3)[:, 1:]
        boxed_B1 = data.answer_positions_B[:, None] >= 0
        fingerprints_BL = np.stack([fingerprint(*tokens) for tokens in tokens_B2]) if len(data) else np.zeros((0, 14))
        return ForwardResult(zeros_R, zeros_R, np.where(boxed_B1, fingerprints_BL, 0).astype(np.float32))


def fingerprint(habit: int, place: int) -> np.ndarray:
    centre = np.random.default_rng(habit).normal(size=LAYERS)
    return centre + 0.01 * np.random.default_rng(place).normal(size=LAYERS)


@pytest.fixture(scope="module")
def memories():
    """Shards by clustering method, each pair started once: no two tests have a problem in common."""
    ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    placement = SimpleNamespace(options=lambda place, environment: {"num_cpus": 0})
    started: dict[str, MemoryGroup] = {}

    def memory_of(config: Config) -> MemoryGroup:
        if config.memory.method not in started:
            started[config.memory.method] = MemoryGroup(config, placement)
        return started[config.memory.method]

    yield memory_of
    ray.shutdown()


@pytest.fixture
def train(memories, monkeypatch, request):
    """Runs the loop over a script; gives the collected groups of each step and the scripted policy."""

    def run(script, steps: int, prompts: int, **settings):
        config = Config()
        config.cluster.ranks_per_node, config.reward.overlong.enabled = 2, False
        config.train.steps, config.train.prompts_per_step = steps, prompts
        config.filter.max_batches = 1
        for name, value in settings.items():
            section, key = name.split("__")
            setattr(getattr(config, section), key, value)
        problems = settings.get("filter__generation_prompts", prompts)
        state, seen, policy = RunState(PromptSampler(problems, seed=0, shuffle=False)), [], ScriptedPolicy()
        monkeypatch.setattr(loop, "report_step", lambda parts, state, collected, *_: seen.append(collected))
        with GraderPool(1, 5.0) as graders:
            parts = SimpleNamespace(
                config=config,
                prompts=[Prompt(Problem(f"{request.node.name} {i}", "?", "7", "t"), [i]) for i in range(problems)],
                engines=ScriptedEngines(script, state),
                policy=policy,
                sync=SimpleNamespace(update=lambda version: None),
                memory=memories(config),
                graders=graders,
                timer=PhaseTimer(),
                validation_due=lambda step: False,
                export_due=lambda step: False,
            )
            loop.train(parts, state)
        return seen, policy

    return run


def sizes(collected) -> list[list[int]]:
    return [[sample.cluster_size for sample in group.samples] for group in collected.groups]


def test_by_default_only_what_is_trained_on_goes_through_the_model_and_is_remembered(train):
    scripts = {1: ["RAAA", "AAAA"], 2: ["RAAu", "RAAA"]}
    seen, policy = train(lambda step, prompt: scripts[step][prompt], 2, 2, memory__method="single")
    assert [group.kept for group in seen[0].groups] == [True, False]
    assert policy.forwarded == [4, 8] and policy.updated == [4, 8]
    assert sizes(seen[1]) == [[0, 3, 3, 0], [0, 0, 0, 0]]


def test_dropped_mistakes_teach_the_memory_if_told_to(train):
    scripts = {1: ["RAAA", "AAAu", "RRRR"], 2: ["RAAA", "RAAA", "RAAA"]}
    seen, policy = train(
        lambda step, prompt: scripts[step][prompt],
        steps=2,
        prompts=3,
        memory__method="single",
        memory__remember_filtered=True,
    )
    assert [group.kept for group in seen[0].groups] == [True, False, False]
    assert policy.forwarded == [4 + 3, 12], "of dropped groups, only mistakes with a fingerprint take a forward pass"
    assert policy.updated == [4, 12]
    assert sizes(seen[1]) == [[0, 3, 3, 3], [0, 3, 3, 3], [0, 0, 0, 0]]


def test_a_step_that_trains_on_nothing_still_teaches_the_memory(train):
    scripts = {1: ["AAAA", "AAuu"], 2: ["AAAA", "uuuu"], 3: ["RAAA", "RuuA"]}
    seen, policy = train(
        lambda step, prompt: scripts[step][prompt],
        steps=3,
        prompts=2,
        memory__method="single",
        memory__remember_filtered=True,
        memory__no_answer="own_cluster",
    )
    assert policy.forwarded == [6, 4, 8] and policy.updated == [8]
    assert sizes(seen[1]) == [[4] * 4, [2] * 4]
    assert sizes(seen[2]) == [[0, 8, 8, 8], [0, 6, 6, 2]]


def test_the_shaped_filter_keeps_mistakes_that_cost_differently(train):
    scripts = {1: ["AAAABB", "AAAABB", "AAAABB"], 2: ["AAAABB", "AAAAAA", "RAAAAA"]}
    seen, policy = train(
        lambda step, prompt: scripts[step][prompt],
        steps=2,
        prompts=3,
        memory__remember_filtered=True,
        filter__metric="shaped",
        advantage__std_floor=0.4,
    )
    assert policy.forwarded == [18, 18] and policy.updated == [12]
    assert [group.kept for group in seen[0].groups] == [False] * 3
    assert [group.kept for group in seen[1].groups] == [True, False, True]
    assert sizes(seen[1])[:2] == [[4, 4, 4, 4, 2, 2], [4] * 6]
    rare, often = -0.1 * np.log(3), -0.1 * np.log(5)
    advantage = (rare - (4 * often + 2 * rare) / 6) / (0.4 + 1e-6)
    assert seen[1].groups[0].samples[-1].advantage == pytest.approx(advantage)


def test_generation_batches_of_one_step_do_not_count_toward_each_other(train):
    seen, policy = train(
        lambda step, prompt: "ABCABC",
        steps=2,
        prompts=4,
        filter__metric="shaped",
        filter__generation_prompts=1,
        filter__max_batches=3,
        memory__remember_filtered=True,
        memory__method="single",
    )
    assert policy.forwarded == [6] * 6
    assert sizes(seen[0]) == [[0] * 6] * 3
    assert sizes(seen[1]) == [[18] * 6] * 3


def test_the_rollout_file_has_the_fingerprints_of_what_was_measured(train):
    seen, _ = train(lambda step, prompt: ["RAAu", "AAAA"][prompt], 1, 2, memory__remember_filtered=False)
    columns = rollout_columns(seen[0].groups)
    ends = ["0|right"] + ["0|wrong"] * 3 + ["1|wrong"] * 4
    assert [key.rpartition(" ")[2] for key in columns["key"]] == ends
    assert columns["kept"] == [True] * 4 + [False] * 4
    for row, (group, place) in enumerate((group, place) for group in seen[0].groups for place in range(4)):
        stored, tokens = columns["fingerprint"][row], group.samples[place].response.token_ids
        if row in (0, 1, 2):
            np.testing.assert_allclose(stored, fingerprint(*tokens), rtol=1e-6)
        else:
            assert stored is None
    assert columns["penalty"] == [0.0] * 4 + [None] * 4
