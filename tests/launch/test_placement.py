"""Nodes and GPUs of ranks and engines, and what Ray gives an actor."""

import os

import pytest
import ray

from meds_megatron.config import ClusterConfig, RolloutConfig
from meds_megatron.launch.placement import Place, Placement, engine_places, rank_places


def test_ranks_fill_one_node_after_the_other():
    places = rank_places(ClusterConfig(nodes=2, ranks_per_node=4))
    assert places[:5] == [Place(0, (0,)), Place(0, (1,)), Place(0, (2,)), Place(0, (3,)), Place(1, (0,))]


@pytest.mark.parametrize(("engines", "tensor"), [(2, 4), (4, 2), (8, 1), (3, 2), (1, 1)])
def test_engines_never_share_a_gpu_or_leave_their_node(engines, tensor):
    cluster = ClusterConfig(nodes=2, ranks_per_node=4)
    places = engine_places(cluster, RolloutConfig(engines=engines, tensor=tensor))
    taken = [(place.node, gpu) for place in places for gpu in place.gpus]
    assert len(set(taken)) == len(taken) == engines * tensor
    assert all(node < 2 and gpu < 4 for node, gpu in taken)
    assert len({place.node for place in places}) == min(engines, 2)


def test_actors_see_the_gpus_of_their_place_first():
    """On GPUs that exist only in Ray's resource count: a process's variables decide which it sees, in which order."""

    class Looker:
        def look(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    ray.init(num_cpus=1, num_gpus=4, include_dashboard=False, logging_level="error")
    try:
        cluster = ClusterConfig(nodes=1, ranks_per_node=4)
        placement = Placement(cluster, use_gpu=True)
        assert placement.wait(30)
        places = [*rank_places(cluster), *engine_places(cluster, RolloutConfig(engines=2, tensor=2))]
        actors = [ray.remote(Looker).options(**placement.options(place, {})).remote() for place in places]
        assert ray.get([actor.look.remote() for actor in actors]) == [
            *("0,1,2,3", "1,0,2,3", "2,0,1,3", "3,0,1,2"),
            *("0,1,2,3", "2,3,0,1"),
        ]
    finally:
        ray.shutdown()


def test_engines_of_their_own_nodes_come_after_the_trainers():
    cluster = ClusterConfig(nodes=2, ranks_per_node=4)
    places = engine_places(cluster, RolloutConfig(engines=4, tensor=2, nodes=2))
    assert places == [Place(2, (0, 1)), Place(3, (0, 1)), Place(2, (2, 3)), Place(3, (2, 3))]
