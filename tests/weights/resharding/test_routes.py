"""Who serves which engine, and what it moves."""

from math import prod

import pytest

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.weights.resharding.plan import ReshardPlan
from meds_megatron.weights.resharding.routes import find_routes, predict


def nodes_of(layout: ParallelLayout, ranks_per_node: int) -> list[int]:
    return [rank // ranks_per_node for rank in range(layout.ranks)]


def test_an_engine_is_served_by_the_replica_on_its_node():
    layout = ParallelLayout(tensor=4, data=2, pipeline=1)
    routes = find_routes(layout, nodes_of(layout, 4), engine_nodes=[0, 1])
    assert all(route.local for route in routes)
    assert [route.rank for route in routes] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_engines_of_a_node_take_turns_among_its_replicas():
    layout = ParallelLayout(data=4)
    routes = find_routes(layout, [0, 0, 1, 1], engine_nodes=[0, 1, 0, 1, 0, 1])
    assert [route.rank for route in routes] == [0, 2, 1, 3, 0, 2]


def test_what_lies_on_another_node_comes_over_the_network():
    layout = ParallelLayout(tensor=4, pipeline=2)
    routes = find_routes(layout, nodes_of(layout, 4), engine_nodes=[0, 1])
    assert [route.local for route in routes] == [route.stage == route.engine for route in routes]
    assert [route.rank for route in routes] == [0, 1, 2, 3, 4, 5, 6, 7] * 2


def test_engines_of_their_own_nodes_take_turns_among_the_replicas():
    layout = ParallelLayout(tensor=2, data=2, pipeline=1)
    routes = find_routes(layout, nodes_of(layout, 4), engine_nodes=[1, 1, 2])
    assert not any(route.local for route in routes)
    assert [[route.rank for route in routes if route.engine == engine] for engine in range(3)] == [
        [0, 1],
        [2, 3],
        [0, 1],
    ]


def test_neighbours_use_the_network_where_memory_is_not_allowed():
    layout = ParallelLayout(tensor=1)
    assert not find_routes(layout, [0], [0], allow_local=False)[0].local


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "engine_nodes"), [("Qwen2.5-7B", 4, 2, [0, 0]), ("Qwen2.5-72B", 8, 4, [0, 1, 2, 3])]
)
def test_traffic_is_what_the_engines_need_and_the_busiest_link_decides(name, tensor, pipeline, engine_nodes):
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    plan = ReshardPlan(QWEN[name], layout, tensor)
    nodes = nodes_of(layout, 8)
    routes = find_routes(layout, nodes, engine_nodes)
    traffic = predict(
        plan, routes, nodes, engine_nodes, item_bytes=2, local_bytes_per_second=1e11, network_bytes_per_second=1e10
    )
    split = [entry for group in plan.table.groups for entry in group if entry.split is not None]
    assert split
    model = 2 * sum(map(prod, plan.table.hf_shapes.values()))
    norms = 2 * sum(prod(s) for n, s in plan.table.hf_shapes.items() if "norm" in n)
    needed = (model + (tensor - 1) * norms) * len(engine_nodes)
    assert traffic.local_bytes + traffic.network_bytes == needed
    assert traffic.gathered_bytes > 2 * needed
    shares = len(engine_nodes) * (1 if pipeline == 2 else pipeline)
    if pipeline == 2:
        assert traffic.network_bytes == 0 and traffic.seconds == traffic.local_seconds
        assert traffic.local_seconds == pytest.approx(needed / shares / tensor / 1e11, rel=0.01)
    else:
        # Each node receives what the other three have.
        assert traffic.network_bytes == pytest.approx(needed * 3 / 4, rel=0.01)
        assert traffic.seconds == pytest.approx(needed * 3 / 16 / 1e10, rel=0.1)
