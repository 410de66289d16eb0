"""A plan carried out with scripted ranks and engines: buckets under way, and engines that fail."""

from types import SimpleNamespace

import pytest
import ray

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.rollout.health import EngineHealth, EngineState
from meds_megatron.rollout.pool import Engine, EnginePool
from meds_megatron.trainer.weight_sync import WeightSync, compare
from meds_megatron.weights.resharding.types import StagedBucket

SHAPE = ModelShape("qwen3", 16, 12, 8, 4, 4, 24, 1280, False, 1e6, 1e-6, 64)


class ScriptedPolicy:
    """Records the buckets that are staged."""

    def __init__(self):
        self.staged: dict[int, set[int]] = {}
        self.history: list[set[int]] = []

    def prepare_weight_sync(self, spec):
        pass

    def on_rank(self, rank, part, method, bucket, *_):
        assert part == "weights"
        mine = self.staged.setdefault(rank, set())
        if method == "stage":
            mine.add(bucket)
            self.history.append(set().union(*self.staged.values()))
            return StagedBucket(checksums={("tensor", (bucket,), 0): bucket})
        mine.remove(bucket)
        return None

    def results(self, calls):
        return calls


class ScriptedPool(EnginePool):
    """Engines that return at once; `failing` is the number of the call of a method at which an engine fails."""

    def __init__(self, count: int, failing: dict[tuple[int, str], int] | None = None):
        self.engines = [Engine(e, 0, {}, EngineHealth(e, 3, EngineState.STALE), actor=e) for e in range(count)]
        self.failing = failing or {}
        self.calls: list[tuple[int, str]] = []

    def call(self, engines, method, *arguments):
        return {engine: self._result_of(engine, method, arguments) for engine in engines}

    def _result_of(self, engine, method, arguments):
        self.calls.append((engine, method))
        if self.failing.get((engine, method)) == self.calls.count((engine, method)):
            return ray.exceptions.RayActorError()
        return {("tensor", (arguments[0],), 0): arguments[0]} if method == "load_bucket" else None

    def _get(self, reference):
        if isinstance(reference, Exception):
            raise reference
        return reference

    def _restart(self, engine, error):
        engine.health.failed("killed")

    def states(self):
        return [engine.health.state.value for engine in self.engines]


@pytest.fixture
def synced():
    def run(pool: ScriptedPool, **settings) -> tuple[WeightSync, ScriptedPolicy]:
        config, policy = Config(), ScriptedPolicy()
        config.cluster.ranks_per_node, config.parallel.pipeline = 2, 2
        config.rollout.engines, config.model.dtype = len(pool.engines), "float32"
        weights = WeightSync(config, SHAPE, policy, pool, "")
        weights.update()
        return weights, policy

    return run


def test_no_more_is_staged_than_the_largest_bucket_and_nothing_stays(synced):
    weights, policy = synced(ScriptedPool(2))
    plan = weights._plan
    elements = [sum(plan.elements(bucket) for bucket in buckets) for buckets in policy.history]
    assert max(map(len, policy.history)) > 2
    assert max(elements) <= plan.largest_bucket
    assert not any(policy.staged.values())


def test_versions_count_updates_and_a_refill_keeps_the_version(synced):
    pool = ScriptedPool(2)
    weights, _ = synced(pool)
    assert weights.version == 0 and pool.states() == ["fresh", "fresh"]
    weights.update()
    assert weights.version == 1
    before = len(pool.calls)
    weights.refill()
    assert len(pool.calls) == before
    pool.engines[0].health.update_began()
    weights.refill()
    assert weights.version == 1 and pool.states() == ["fresh", "fresh"]
    assert {engine for engine, _ in pool.calls[before:]} == {0}


@pytest.mark.parametrize("method", ["connect", "begin_weight_update", "load_bucket", "finish_weight_update"])
def test_an_engine_that_fails_is_left_out_and_the_others_finish(synced, method):
    pool = ScriptedPool(3, failing={(1, method): 2 if method == "load_bucket" else 1})
    _, policy = synced(pool)
    assert pool.states() == ["fresh", "starting", "fresh"]
    assert [engine.health.restarts for engine in pool.engines] == [0, 1, 0]
    assert not any(policy.staged.values())
    loads = [pool.calls.count((engine, "load_bucket")) for engine in range(3)]
    assert loads[0] == loads[2] == SHAPE.num_layers + 2 and (method == "finish_weight_update") == (loads[1] == loads[0])


def test_a_restarted_engine_is_connected_again(synced):
    pool = ScriptedPool(2, failing={(1, "load_bucket"): 3})
    weights, _ = synced(pool)
    pool.engines[1].actor = "another process"
    pool.engines[1].health.started()
    weights.refill()
    assert pool.states() == ["fresh", "fresh"]
    assert [pool.calls.count((engine, "connect")) for engine in range(2)] == [1, 2]


def test_all_engines_may_fail_in_one_update(synced):
    pool = ScriptedPool(2, failing={(0, "load_bucket"): 2, (1, "load_bucket"): 2})
    _, policy = synced(pool)
    assert pool.states() == ["starting", "starting"]
    assert not any(policy.staged.values())


@pytest.mark.parametrize("error", [ray.exceptions.OutOfMemoryError("killed"), ray.exceptions.RayActorError()])
def test_all_errors_that_ray_reports_of_an_engine_are_its_failure(error):
    def lost(_):
        raise error

    restarted = []
    pool = SimpleNamespace(engines=["engine"], _get=lost, _restart=lambda *what: restarted.append(what))
    assert EnginePool.outcomes(pool, {0: None}) == {}
    assert restarted == [("engine", error)]


def test_equal_checksums_pass():
    sent = {("model.norm.weight", (0,), 0): 5, ("model.norm.weight", (0,), 1): 5}
    compare(sent, {("model.norm.weight", (0,), 1): 5}, engine=0)


def test_a_difference_names_the_tensor_and_the_place():
    sent = {("lm_head.weight", (64, 0), 1): 5}
    with pytest.raises(UserError, match=r"engine 2 \(rank 1\) received other values of lm_head.weight from \[64, 0\]"):
        compare(sent, {("lm_head.weight", (64, 0), 1): 6}, engine=2)
