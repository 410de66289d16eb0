"""A plan carried out with scripted ranks and engines: buckets under way, and engines that fail."""

import logging

import pytest
import ray

from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.trainer.weight_sync import WeightSync, compare
from tests.doubles import ScriptedEnginePool, ScriptedPolicy

SHAPE = ModelShape("qwen3", 16, 12, 8, 4, 4, 24, 1280, False, 1e6, 1e-6, 64)


def synced(engines: int, **failures) -> tuple[WeightSync, ScriptedPolicy, ScriptedEnginePool]:
    """Engines that have got their first weights from two pipeline stages, and fail as `failures` say."""
    config, policy = Config(), ScriptedPolicy()
    config.cluster.ranks_per_node, config.parallel.pipeline = 2, 2
    config.rollout.engines, config.model.dtype = engines, "float32"
    pool = ScriptedEnginePool(config, **failures)
    weights = WeightSync(config, SHAPE, policy, pool, "")
    weights.update()
    return weights, policy, pool


def states(pool: ScriptedEnginePool) -> list[str]:
    return [engine.health.state.value for engine in pool.engines]


def test_no_more_is_staged_than_the_largest_bucket_and_nothing_stays():
    _, policy, _ = synced(2)
    plan = policy.spec.plan()
    elements = [sum(plan.elements(bucket) for bucket in buckets) for buckets in policy.staged_history]
    assert max(map(len, policy.staged_history)) > 2
    assert max(elements) <= plan.largest_bucket
    assert not any(policy.staged.values())


def test_versions_count_updates_and_a_refill_keeps_the_version():
    weights, _, pool = synced(2)
    assert weights.version == 0 and states(pool) == ["fresh", "fresh"]
    weights.update()
    assert weights.version == 1
    before = len(pool.calls)
    weights.refill()
    assert len(pool.calls) == before
    pool.engines[0].health.update_began()
    weights.refill()
    assert weights.version == 1 and states(pool) == ["fresh", "fresh"]
    assert {engine for *_, engine in pool.calls[before:]} == {0}


@pytest.mark.parametrize("method", ["connect", "begin_weight_update", "load_bucket", "finish_weight_update"])
def test_an_engine_that_fails_is_left_out_and_the_others_finish(method):
    _, policy, pool = synced(3, failing={(1, method): 2 if method == "load_bucket" else 1})
    assert states(pool) == ["fresh", "starting", "fresh"]
    assert [engine.health.restarts for engine in pool.engines] == [0, 1, 0]
    assert not any(policy.staged.values())
    loads = [pool.count(engine, "load_bucket") for engine in range(3)]
    assert loads[0] == loads[2] == SHAPE.num_layers + 2 and (method == "finish_weight_update") == (loads[1] == loads[0])


def test_a_restarted_engine_is_connected_again():
    weights, _, pool = synced(2, failing={(1, "load_bucket"): 3})
    assert states(pool) == ["fresh", "starting"]
    weights.refill()
    assert states(pool) == ["fresh", "fresh"]
    assert [pool.count(engine, "connect") for engine in range(2)] == [1, 2]


def test_all_engines_may_fail_in_one_update():
    _, policy, pool = synced(2, failing={(0, "load_bucket"): 2, (1, "load_bucket"): 2})
    assert states(pool) == ["starting", "starting"]
    assert not any(policy.staged.values())


@pytest.mark.parametrize("error", [ray.exceptions.OutOfMemoryError("killed"), ray.exceptions.RayActorError()])
def test_all_errors_that_ray_reports_of_an_engine_are_its_failure(error, caplog):
    pool = ScriptedEnginePool(Config(), failing={(0, "random_states"): 1}, error=error)
    failed = pool.engines[0].actor
    with caplog.at_level(logging.INFO):
        assert pool.outcomes(pool.call([0], "random_states")) == {}
    assert pool.restarts == pool.engines[0].health.restarts == 1 and pool.engines[0].actor is not failed
    assert caplog.messages[-1] == f"all that engine 0 raised:\n{error}"


def test_equal_checksums_pass():
    sent = {("model.norm.weight", (0,), 0): 5, ("model.norm.weight", (0,), 1): 5}
    compare(sent, {("model.norm.weight", (0,), 1): 5}, engine=0)


def test_a_difference_names_the_tensor_and_the_place():
    sent = {("lm_head.weight", (64, 0), 1): 5}
    with pytest.raises(UserError, match=r"engine 2 \(rank 1\) received other values of lm_head.weight from \[64, 0\]"):
        compare(sent, {("lm_head.weight", (64, 0), 1): 6}, engine=2)
