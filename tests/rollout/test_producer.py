"""Groups from real engines and real graders."""

import numpy as np
import pytest

from meds_megatron.data.problems import Problem
from meds_megatron.data.prompts import Prompt
from meds_megatron.reward.grading import GraderPool
from meds_megatron.reward.scores import overlong_penalties
from meds_megatron.rollout.producer import GroupProducer, failed_gradings
from meds_megatron.rollout.settings import Sampling
from tests.rollout.engine_cases import comparable, engine_config

SAMPLING = Sampling(responses=3, max_tokens=60)
PROMPTS = [Prompt(Problem(str(n), f"question {n}", str(n), "made"), [40 + n, 50, 60 + n]) for n in range(30)]


class Graders(GraderPool):
    """A pool that records its texts."""

    def __init__(self):
        super().__init__(workers=1, timeout_seconds=10)
        self.texts = []

    def submit(self, response_text, answer):
        self.texts.append(response_text)
        return super().submit(response_text, answer)


@pytest.fixture(scope="module")
def parts(cpu_engines, shared_ray):
    config = engine_config()
    config.reward.overlong.buffer = 90
    with Graders() as graders:
        yield config, shared_ray.pool, graders


def all_groups(producer):
    """Groups in the order of submission."""
    groups = {}
    while producer.busy:
        groups |= producer.advance()
    return [groups[number] for number in sorted(groups)]


@pytest.mark.parametrize("seed", [1, None])
def test_groups_hold_graded_completions_of_their_prompts(parts, seed):
    config, pool, graders = parts
    producer = GroupProducer(pool, graders, config)
    assert not producer.busy
    assert producer.submit(PROMPTS, SAMPLING, seed) == list(range(30))
    groups = all_groups(producer)
    assert [group.prompt for group in groups] == PROMPTS
    for group in groups:
        assert len(group.samples) == 3 and group.kept
        texts = [sample.completion.text for sample in group.samples]
        grades = graders.grade(texts, [group.prompt.problem.answer] * 3)
        assert [sample.grade for sample in group.samples] == grades
        lengths = [len(sample.completion.token_ids_S) for sample in group.samples]
        penalties = overlong_penalties(lengths, 100, config.reward.overlong)
        assert [sample.score for sample in group.samples] == [
            float(grade.correct) + float(penalty) for grade, penalty in zip(grades, penalties, strict=True)
        ]
        assert group.accuracy == [float(grade.correct) for grade in grades]
    assert failed_gradings(groups) == 0


def test_groups_of_a_seed_are_those_of_one_call_of_the_pool(parts):
    config, pool, graders = parts
    producer = GroupProducer(pool, graders, config)
    producer.submit(PROMPTS, SAMPLING, seed=1)
    groups = all_groups(producer)
    expected = pool.generate([prompt.token_ids for prompt in PROMPTS], SAMPLING, seed=1)
    made = [[sample.completion for sample in group.samples] for group in groups]
    assert comparable(made) == comparable(expected)


def test_groups_are_graded_while_others_are_decoded(parts):
    config, pool, graders = parts
    producer = GroupProducer(pool, graders, config)
    producer.submit(PROMPTS, SAMPLING, seed=2)
    graders.texts.clear()
    first = {}
    while not first:
        first = producer.advance()
    assert len(graders.texts) < 3 * len(PROMPTS)
    assert len(first) + len(all_groups(producer)) == len(PROMPTS)


def test_a_grading_that_fails_is_counted_and_gives_no_score(parts, monkeypatch):
    config, pool, graders = parts
    producer = GroupProducer(pool, graders, config)
    monkeypatch.setattr(graders, "submit", lambda text, answer: GraderPool.submit(graders, "\\boxed{1}", answer))
    nothing = Prompt(Problem("empty", "question", "$$", "made"), [41, 50, 61])
    producer.submit([nothing], Sampling(responses=2, max_tokens=5), seed=0)
    (group,) = all_groups(producer)
    assert [sample.grade.outcome for sample in group.samples] == ["error", "error"]
    assert failed_gradings([group]) == 2
    assert group.accuracy == [] and np.isnan([sample.score for sample in group.samples]).all()
