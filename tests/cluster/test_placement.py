"""Nodes and GPUs of ranks and engines, and what Ray gives an actor."""

import os
from contextlib import closing

import pytest
import ray
import torch

from meds_megatron.cluster.device import require_gpu, resolve_device
from meds_megatron.cluster.placement import ALLOCATOR_ENV_VARS, Place, Placement, engine_places, rank_places
from meds_megatron.cluster.ray_cluster import reserve_nodes
from meds_megatron.config import ClusterConfig, Config, RolloutConfig
from meds_megatron.config.network import network_env_vars
from meds_megatron.errors import UserError


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


def seen(placement: Placement, places: list[Place], variable: str = "CUDA_VISIBLE_DEVICES") -> list[str]:
    """An environment variable of an actor at each place."""

    class Looker:
        def look(self) -> str:
            return os.environ[variable]

    actors = [ray.remote(Looker).options(**placement.options(place, {})).remote() for place in places]
    return ray.get([actor.look.remote() for actor in actors])


@pytest.fixture(scope="module")
def pretend_gpus(own_ray):
    """Two Ray nodes whose GPUs exist only in Ray's resource count: 4 to 7 of the one, 0 to 3 of the other. A process's
    variables decide which GPUs it sees, in which order."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for visible in ("4,5,6,7", "0,1,2,3"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
                for name in ALLOCATOR_ENV_VARS:
                    patch.setenv(name, "expandable_segments:True")
                cluster.add_node(num_cpus=1, num_gpus=4, include_dashboard=False)
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_actors_see_the_gpus_that_ray_reserved_for_the_run(pretend_gpus):
    """Beside another job that has two GPUs of one node, and where a node was given the GPUs 4 to 7."""
    cluster = ClusterConfig(nodes=1, ranks_per_node=2)
    engines = engine_places(cluster, RolloutConfig(engines=1, tensor=2, nodes=1))
    with (
        closing(Placement(ClusterConfig(nodes=2, ranks_per_node=2), use_gpu=True)) as other,
        closing(Placement(cluster, use_gpu=True, engine_nodes=1)) as placement,
    ):
        assert other.wait(30) and placement.wait(30)
        taken = [ids.split(",") for ids in seen(other, [Place(0, (0,)), Place(1, (0,))])]
        *ranks, engine = (ids.split(",") for ids in seen(placement, [*rank_places(cluster), *engines]))
    assert ranks[1] == ranks[0][::-1]
    every = [{"0", "1", "2", "3"}, {"4", "5", "6", "7"}]
    for ids in (ranks[0], engine):
        node = next(gpus for gpus in every if set(ids) <= gpus)
        assert sum(set(theirs) == node - set(ids) for theirs in taken) == 1


def test_actors_see_the_gpus_of_their_place_first(pretend_gpus):
    cluster = ClusterConfig(nodes=2, ranks_per_node=4)
    with closing(Placement(cluster, use_gpu=True)) as placement:
        assert placement.wait(30)
        places = [*rank_places(cluster), *engine_places(cluster, RolloutConfig(engines=4, tensor=2))]
        orders = seen(placement, places)
    first = 4 if orders[0].startswith("4") else 0
    expected = [
        ",".join(str(gpu + start) for gpu in order)
        for start in (first, 4 - first)
        for order in ((0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 0, 1, 2))
    ]
    assert orders[:8] == expected
    engine_orders = [(0, 1, 2, 3), (2, 3, 0, 1)]
    assert orders[8:] == [
        ",".join(str(gpu + start) for gpu in order) for order in engine_orders for start in (first, 4 - first)
    ]


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_an_inherited_setting_of_the_allocator_does_not_reach_processes_that_share_memory(pretend_gpus, variable):
    with closing(Placement(ClusterConfig(nodes=1, ranks_per_node=1), use_gpu=True)) as placement:
        assert placement.wait(30)
        assert seen(placement, [Place(0, (0,))], variable) == ["expandable_segments:False"]


def test_a_node_that_cannot_read_the_model_is_named(pretend_gpus, tmp_path):
    placement = Placement(ClusterConfig(nodes=1, ranks_per_node=4), use_gpu=True)
    with closing(placement), pytest.raises(UserError, match=rf"{tmp_path}/model: node .+ cannot read it"):
        placement.wait(30, paths=[tmp_path, tmp_path / "model"])


def test_too_few_gpus_are_refused_with_what_there_is(pretend_gpus, monkeypatch):
    monkeypatch.setattr("meds_megatron.cluster.ray_cluster.PLACEMENT_SECONDS", 1)
    config = Config(cluster=ClusterConfig(nodes=3, ranks_per_node=4))
    with pytest.raises(UserError, match=r"did not have 3 nodes with 4 free GPUs.*2: .* with 4 GPUs, .* with 4 GPUs"):
        reserve_nodes(config, use_gpu=True)


def test_a_process_without_a_gpu_does_not_fall_back_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"cluster\.device = cuda, but torch .* finds no GPU on"):
        require_gpu()


def test_network_interfaces_are_those_of_the_config():
    assert network_env_vars(ClusterConfig()) == {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    assert network_env_vars(ClusterConfig(address="auto")) == {}
    assert network_env_vars(ClusterConfig(address="auto", interface="ib0", infiniband="mlx5")) == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_IB_HCA": "mlx5",
    }


def test_engines_of_their_own_nodes_come_after_the_trainers():
    cluster = ClusterConfig(nodes=2, ranks_per_node=4)
    places = engine_places(cluster, RolloutConfig(engines=4, tensor=2, nodes=2))
    assert places == [Place(2, (0, 1)), Place(3, (0, 1)), Place(2, (2, 3)), Place(3, (2, 3))]


def test_the_device_is_that_of_the_clusters_machines(pretend_gpus):
    """The driver's own machine has no GPU."""
    address = ray.get_runtime_context().gcs_address
    ray.shutdown()
    assert resolve_device(ClusterConfig(address=address)) == "cuda"
    assert resolve_device(ClusterConfig(address=address, device="cpu")) == "cpu"
