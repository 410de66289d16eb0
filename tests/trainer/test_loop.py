"""The loop with real shards, real routing of fingerprints and real grading; engines and policy are scripted."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import Config
from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.faults.interruption import Interruption
from meds_megatron.faults.supervision import Supervisor
from meds_megatron.memory import UNKNOWN
from meds_megatron.reward.grading import Grade, GraderPool
from meds_megatron.rollout.samples import Completion, PromptGroup, Sample, Segment
from meds_megatron.trainer.error_memory import ErrorMemory
from meds_megatron.trainer.state import TrainerState
from tests.doubles import Call, ScriptedEnginePool, ScriptedPolicy, ScriptedProducer, ScriptedWeightSync
from tests.trainer.training_parts import Parts

LAYERS = 14


class SpelledGroups:
    """Groups as `script(step, prompt)` spells them, a letter a completion: R is right, u wrong without an answer,
    others are wrong by a habit, t by one that no grading decides. N answers 9, the other habits 8. A completion's
    tokens are its letter and its number, so that no two fingerprints are equal."""

    def __init__(self, script: Callable[[int, int], str], state: TrainerState, graders: GraderPool):
        self._script, self._state, self._graders, self._drawn = script, state, graders, 0

    def __call__(self, prompt: Prompt) -> PromptGroup:
        letters = self._script(self._state.step, prompt.token_ids[0])
        completions = [self._completion(letter) for letter in letters]
        grades = self._graders.grade([c.text for c in completions], [prompt.problem.answer] * len(completions))
        grades = [Grade(False, "timeout") if letter == "t" else g for letter, g in zip(letters, grades, strict=True)]
        scores = [np.nan if grade.failed else float(grade.correct) for grade in grades]
        parts = zip(completions, grades, scores, strict=True)
        return PromptGroup(prompt, [Sample(prompt, *part) for part in parts])

    def _completion(self, letter: str) -> Completion:
        self._drawn += 1
        text = {"R": "\\boxed{7}", "u": "no idea", "N": "\\boxed{9.0}"}.get(letter, "\\boxed{8}")
        tokens_R = np.array([ord(letter), self._drawn])
        segment = Segment.drawn(tokens_R, np.zeros(2, np.float32), [(0, 0)])
        return Completion((segment,), text, "stop", -1 if letter == "u" else 0)


def fingerprint(habit: int, place: int) -> np.ndarray:
    centre = np.random.default_rng(habit).normal(size=LAYERS)
    return centre + 0.01 * np.random.default_rng(place).normal(size=LAYERS)


def fingerprints_of(batch: TrainBatch) -> np.ndarray:
    """They show the habit that a completion's tokens name."""
    return np.stack([fingerprint(*tokens) for tokens in batch.tokens_T.reshape(-1, 3)[:, 1:]])


@pytest.fixture(scope="module")
def memories(shared_ray):
    """Shards by clustering method, each pair started once: no two tests have a problem in common."""
    placement = SimpleNamespace(options=lambda place, env_vars: {"num_cpus": 0})
    started: dict[str, ErrorMemory] = {}

    def memory_of(config: Config) -> ErrorMemory:
        if config.memory.method not in started:
            started[config.memory.method] = ErrorMemory(config, placement, Supervisor(""))
        return started[config.memory.method]

    yield memory_of
    for memory in started.values():
        memory.close()


@pytest.fixture
def train(memories, request):
    """Runs the loop over a script; gives the columns of each step's rollout file, its metrics and the policy."""

    def run(script, steps: int, prompts: int, **settings):
        config = Config()
        config.cluster.ranks_per_node, config.reward.overlong.enabled = 2, False
        config.train.steps, config.train.prompts_per_step = steps, prompts
        config.train.export_hf, config.filter.max_batches = False, 1
        for name, value in settings.items():
            section, key = name.split("__")
            setattr(getattr(config, section), key, value)
        problems = settings.get("filter__generation_prompts", prompts)
        names = [f"{request.node.name} {i}" for i in range(problems)]
        train_prompts = [Prompt(Problem(name, "?", "7", "test"), [i]) for i, name in enumerate(names)]
        state = TrainerState(PromptSampler(problems, seed=0, shuffle=False))
        calls: list[Call] = []
        policy, pool = ScriptedPolicy(calls, fingerprints_of), ScriptedEnginePool(config, calls)
        pool.start()
        calls.clear()
        rollouts, metrics = [], []
        with GraderPool(1, 5.0) as graders:
            producer = ScriptedProducer(SpelledGroups(script, state, graders), calls)
            parts = Parts(
                config,
                state,
                train_prompts,
                producer,
                pool,
                policy,
                ScriptedWeightSync(calls),
                memories(config),
                Interruption(),
            )
            saved = SimpleNamespace(started=False, save_rollouts=lambda step, columns: rollouts.append(columns))
            logged = SimpleNamespace(log=lambda step, values: metrics.append(values), log_responses=lambda *_: None)
            parts.loop(saved, logged).train()
        return rollouts, policy

    return run


SLEEP_WITH_WEIGHTS, SLEEP_WITHOUT_WEIGHTS = "sleep True 0", "sleep False 0"
WAKE_WEIGHTS, WAKE_KV_CACHE = "wake weights 0", "wake kv_cache 0"
"""Calls of the one engine."""


def in_words(calls: list[Call]) -> list[str]:
    return [" ".join(map(str, call)) for call in calls]


def by_group(columns: dict, name: str) -> list[list]:
    """A column's values, a list for each group."""
    groups = np.asarray(columns["group"])
    return [[columns[name][row] for row in np.flatnonzero(groups == group)] for group in range(groups.max() + 1)]


def sizes(columns: dict) -> list[list[int]]:
    """Cluster sizes by group, None where a response was not scored."""
    return by_group(columns, "cluster_size")


def kept(columns: dict) -> list[bool]:
    return [bool(values[0]) for values in by_group(columns, "kept")]


def test_by_default_only_what_is_trained_on_goes_through_the_model_and_is_remembered(train):
    scripts = {1: ["RAAA", "AAAA"], 2: ["RAAu", "RAAA"]}
    seen, policy = train(lambda step, prompt: scripts[step][prompt], 2, 2, memory__method="single")
    assert kept(seen[0]) == [True, False]
    assert policy.forwarded == [4, 8] and policy.updated == [4, 8]
    assert sizes(seen[1]) == [[0, 3, 3, 0], [0, 0, 0, 0]]


def test_mistakes_of_dropped_groups_are_remembered_with_remember_filtered(train):
    scripts = {1: ["RAAA", "AAAu", "RRRR"], 2: ["RAAA", "RAAA", "RAAA"]}
    seen, policy = train(
        lambda step, prompt: scripts[step][prompt],
        steps=2,
        prompts=3,
        memory__method="single",
        memory__remember_filtered=True,
    )
    assert kept(seen[0]) == [True, False, False]
    assert policy.forwarded == [4 + 3, 12], "of dropped groups, only mistakes with a fingerprint take a forward pass"
    assert policy.updated == [4, 12]
    assert sizes(seen[1]) == [[0, 3, 3, 3], [0, 3, 3, 3], [0, 0, 0, 0]]


def test_the_memory_by_answer_counts_equal_answers_whatever_the_habit_and_needs_no_forward_pass(train):
    scripts = {1: ["RABN", "AABu"], 2: ["RANB", "RAAN"], 3: ["RRRN", "RNuu"]}
    seen, policy = train(
        lambda step, prompt: scripts[step][prompt],
        steps=3,
        prompts=2,
        memory__method="answer",
        memory__remember_filtered=True,
        memory__no_answer="own_cluster",
    )
    assert policy.forwarded == policy.updated == [4, 8, 8]
    assert sizes(seen[1]) == [[0, 2, 1, 2], [0, 3, 3, 0]]
    assert sizes(seen[2]) == [[0, 0, 0, 2], [0, 1, 1, 1]]


def test_a_step_that_trains_on_nothing_is_still_remembered(train):
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
    assert kept(seen[0]) == [False] * 3
    assert kept(seen[1]) == [True, False, True]
    assert sizes(seen[1])[:2] == [[4, 4, 4, 4, 2, 2], [4] * 6]
    rare, often = -0.1 * np.log(3), -0.1 * np.log(5)
    advantage = (rare - (4 * often + 2 * rare) / 6) / (0.4 + 1e-6)
    assert by_group(seen[1], "advantage")[0][-1] == pytest.approx(advantage)


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


def test_the_rollout_file_has_the_fingerprints_of_what_was_scored(train):
    (columns,), _ = train(lambda step, prompt: ["RAAu", "AAAA"][prompt], 1, 2, memory__remember_filtered=False)
    ends = ["0|right"] + ["0|wrong"] * 3 + ["1|wrong"] * 4
    assert [key.rpartition(" ")[2] for key in columns["key"]] == ends
    assert list(columns["kept"]) == [True] * 4 + [False] * 4
    for row, tokens_R in enumerate(columns["response_token_ids"]):
        if row in (0, 1, 2):
            np.testing.assert_allclose(columns["fingerprint"][row], fingerprint(*tokens_R), rtol=1e-6)
        else:
            assert columns["fingerprint"][row] is None
    assert columns["penalty"] == [0.0] * 4 + [None] * 4
    assert columns["cluster_label"] == [None, UNKNOWN, UNKNOWN, None] + [None] * 4
    assert [value is not None for value in columns["advantage"]] == [True] * 4 + [False] * 4


def test_the_cluster_of_a_recurring_mistake_is_named_in_the_rollout_file(train):
    (_, second), _ = train(lambda step, prompt: "RAAAABBBB", 2, 1)
    labels, counts = second["cluster_label"], second["cluster_size"]
    assert labels[0] is None and len(set(labels[1:5])) == len(set(labels[5:])) == 1
    assert {labels[1], labels[5]} == {0, 1} and counts == [0] + [4] * 8


def test_failed_gradings_are_neither_trained_on_nor_remembered(train):
    scripts = {1: ["RAAt", "tttt"], 2: ["RAAA", "tttt"]}
    seen, policy = train(
        lambda step, prompt: scripts[step][prompt], 2, 2, memory__method="single", filter__metric="none"
    )
    assert policy.forwarded == policy.updated == [3, 4]
    assert kept(seen[0]) == [True, True] and sizes(seen[0]) == [[0, 0, 0, None], [None] * 4]
    assert sizes(seen[1]) == [[0, 2, 2, 2], [None] * 4]
    for name in ("score", "penalty", "shaped_score", "advantage"):
        assert [value is None for value in by_group(seen[0], name)[0]] == [False, False, False, True]
        assert by_group(seen[0], name)[1] == [None] * 4
    # Of scores 1, 0, 0 the mean is 1/3 and the deviation 1 / sqrt(3).
    assert by_group(seen[0], "advantage")[0][0] == pytest.approx(2 / 3 / (1 / 3**0.5 + 1e-6))
    assert list(seen[0]["outcome"])[3:] == ["timeout"] * 5


def test_a_step_whose_gradings_all_failed_trains_on_nothing(train):
    seen, policy = train(lambda step, prompt: ["tttt", "RAAA"][step - 1], 2, 1, filter__metric="none")
    assert policy.forwarded == policy.updated == [4]
    assert seen[0]["advantage"] == [None] * 4 and list(seen[0]["kept"]) == [True] * 4


def test_memory_of_shared_gpus_moves_between_engines_and_trainer(train):
    """The policy is offloaded before each part that the engines take back, and onloaded for the update. Engines
    that are given new weights, or the same ones again, drop the old ones."""
    _, policy = train(lambda step, prompt: ["RAAA", "tttt"][step - 1], steps=2, prompts=1, filter__metric="none")
    assert in_words(policy.calls) == [
        *["generate", "refill", SLEEP_WITHOUT_WEIGHTS, "forward", "onload", "update"],
        *["offload", WAKE_WEIGHTS, "sync", "offload", WAKE_KV_CACHE],
        *["generate", "refill", SLEEP_WITHOUT_WEIGHTS, "onload"],
        *["offload", WAKE_WEIGHTS, "refill", "offload", WAKE_KV_CACHE],
    ]


def test_engines_wake_for_every_generation_batch_of_the_shaped_filter(train):
    _, policy = train(
        lambda step, prompt: "AAAA",
        steps=1,
        prompts=1,
        filter__metric="shaped",
        filter__max_batches=2,
    )
    wake = ["offload", WAKE_WEIGHTS, "offload", WAKE_KV_CACHE]
    last = ["onload", "offload", WAKE_WEIGHTS, "refill", "offload", WAKE_KV_CACHE]
    generated = ["generate", "refill", SLEEP_WITH_WEIGHTS, "forward"]
    assert in_words(policy.calls) == [*generated, *wake, *generated, *last]


def test_a_generation_batch_whose_gradings_all_failed_is_joined_to_others(train):
    batches = iter(["tttt", "RAAA"])
    (columns,), policy = train(
        lambda step, prompt: next(batches),
        steps=1,
        prompts=2,
        filter__metric="shaped",
        filter__generation_prompts=1,
        filter__max_batches=2,
    )
    assert policy.forwarded == policy.updated == [4] and kept(columns) == [False, True]
    assert [value is None for value in columns["fingerprint"]] == [True] * 4 + [False] * 4
