"""The carrying out of a plan with scripted ranks and engines: what is under way, and who is left behind."""

from types import SimpleNamespace

import pytest
import ray
from meds_megatron.rollout.fleet import Fleet, Health
from meds_megatron.rollout.group import FAILED, EngineGroup
from meds_megatron.trainer.sync import WeightSync, compare
from meds_megatron.weights.resharding.messages import Staged

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.trainer import sync

SHAPE = ModelShape("qwen3", 16, 12, 8, 4, 4, 24, 1280, False, 1e6, 1e-6, 64)


class ScriptedPolicy:
    """Notes which groups lie staged."""

    def __init__(self):
        self.staged: dict[int, set[int]] = {}
        self.most: list[set[int]] = []

    def prepare_sync(self, spec):
        pass

    def on_rank(self, rank, method, group, *_):
        mine = self.staged.setdefault(rank, set())
        if method == "stage":
            mine.add(group)
            self.most.append(set().union(*self.staged.values()))
            return Staged(checksums={("tensor", (group,), 0): group})
        mine.remove(group)
        return None


class ScriptedEngines:
    """Engines that answer at once; `dying` says at which call of a method an engine fails."""

    def __init__(self, count: int, dying: dict[tuple[int, str], int] | None = None):
        self.fleet = Fleet(count, max_failures=3)
        self.engines = list(range(count))
        self.dying = dying or {}
        self.calls: list[tuple[int, str]] = []
        for engine in range(count):
            self.fleet.started(engine)

    def ready(self):
        return self.fleet.having(Health.STALE, Health.FRESH)

    def wake(self, part):
        pass

    def call(self, engines, method, *arguments):
        return {engine: self._answer(engine, method, arguments) for engine in engines}

    def outcomes(self, calls):
        for engine, value in calls.items():
            if value is FAILED and self.fleet.health[engine] is not Health.STARTING:
                self.fleet.failed(engine, "killed")
        return {engine: value for engine, value in calls.items() if value is not FAILED}

    def _answer(self, engine, method, arguments):
        self.calls.append((engine, method))
        if self.dying.get((engine, method)) == self.calls.count((engine, method)):
            return FAILED
        return {("tensor", (arguments[0],), 0): arguments[0]} if method == "load_group" else None


@pytest.fixture
def synced(monkeypatch):
    monkeypatch.setattr(sync.ray, "get", lambda values: values)

    def run(engines: ScriptedEngines, **settings) -> tuple[WeightSync, ScriptedPolicy]:
        config, policy = Config(), ScriptedPolicy()
        config.cluster.ranks_per_node, config.parallel.pipeline = 2, 2
        config.rollout.engines, config.model.dtype = len(engines.engines), "float32"
        weights = WeightSync(config, SHAPE, policy, engines, "")
        weights.update(version=0)
        return weights, policy

    return run


def test_no_more_is_staged_than_the_largest_group_and_nothing_stays(synced):
    weights, policy = synced(ScriptedEngines(2))
    plan = weights._plan
    elements = [sum(plan.elements(group) for group in groups) for groups in policy.most]
    assert max(map(len, policy.most)) > 2
    assert max(elements) <= plan.largest_group
    assert not any(policy.staged.values())


@pytest.mark.parametrize("method", ["connect", "begin_weight_update", "load_group", "finish_weight_update"])
def test_an_engine_that_dies_is_left_behind_and_the_others_finish(synced, method):
    engines = ScriptedEngines(3, dying={(1, method): 2 if method == "load_group" else 1})
    _, policy = synced(engines)
    assert [health.value for health in engines.fleet.health] == ["fresh", "starting", "fresh"]
    assert engines.fleet.restarts == 1
    assert not any(policy.staged.values())
    loads = [engines.calls.count((engine, "load_group")) for engine in range(3)]
    assert loads[0] == loads[2] == SHAPE.num_layers + 2 and (method == "finish_weight_update") == (loads[1] == loads[0])


def test_an_engine_that_was_started_anew_is_connected_again(synced):
    engines = ScriptedEngines(2, dying={(1, "load_group"): 3})
    weights, _ = synced(engines)
    engines.engines[1] = "another process"
    engines.fleet.started(1)
    weights.fill([1])
    assert engines.fleet.having(Health.FRESH) == [0, 1]
    assert [engines.calls.count((engine, "connect")) for engine in range(2)] == [1, 2]


def test_all_engines_may_die_in_one_update(synced):
    engines = ScriptedEngines(2, dying={(0, "load_group"): 2, (1, "load_group"): 2})
    _, policy = synced(engines)
    assert engines.fleet.having(Health.STARTING) == [0, 1]
    assert not any(policy.staged.values())


@pytest.mark.parametrize("error", [ray.exceptions.OutOfMemoryError("killed"), ray.exceptions.RayActorError()])
def test_whatever_ray_reports_of_an_engine_is_its_failure(monkeypatch, error):
    def lost(_):
        raise error

    replaced = []
    monkeypatch.setattr(ray, "get", lost)
    group = SimpleNamespace(_replace=lambda *what: replaced.append(what))
    assert EngineGroup.outcome(group, 0, "actor", None) is FAILED
    assert replaced == [(0, "actor", error)]


def test_equal_checksums_pass_and_others_belong_to_other_engine_ranks():
    sent = {("model.norm.weight", (0,), 0): 5, ("model.norm.weight", (0,), 1): 5}
    compare(sent, {("model.norm.weight", (0,), 1): 5}, engine=0)


def test_a_difference_names_the_tensor_and_the_place():
    sent = {("lm_head.weight", (64, 0), 1): 5}
    with pytest.raises(UserError, match=r"engine 2 \(rank 1\) received other values of lm_head.weight from \[64, 0\]"):
        compare(sent, {("lm_head.weight", (64, 0), 1): 6}, engine=2)
