"""The trainer rank that serves each engine."""

from meds_megatron.config.layout import ParallelLayout
from meds_megatron.weights.resharding.plan import find_routes


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


def test_context_parallel_ranks_are_replicas_too():
    layout = ParallelLayout(tensor=2, context=2, data=2)
    routes = find_routes(layout, nodes_of(layout, 8), engine_nodes=[0, 0, 0, 0, 0])
    assert [route.rank for route in routes if route.trainer_rank == 1] == [1, 3, 5, 7, 1]


def test_weights_on_another_node_come_over_the_network():
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
