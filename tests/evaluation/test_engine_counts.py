"""Number and places of the engines of an evaluation."""

import pytest

from meds_megatron.cluster.placement import engine_places
from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.evaluation.generate import size_to_machine


def sized(monkeypatch, gpus: list[int], engines: int | None, tensor: int = 1, device: str = "cuda") -> Config:
    """A config sized to nodes with these GPUs; a dead node is there as well."""
    nodes = [{"Alive": True, "Resources": {"GPU": count} if count else {}} for count in gpus]
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 8}}])
    config = Config()
    config.cluster.device, config.rollout.tensor = device, tensor
    size_to_machine(config, engines)
    return config


@pytest.mark.parametrize(
    ("gpus", "engines", "tensor", "expected"),
    [
        ([8], None, 1, (8, 1, 8)),
        ([8, 8, 0], None, 2, (8, 2, 8)),
        ([8, 8], 3, 2, (3, 2, 4)),
        ([8, 8], 1, 8, (1, 1, 8)),
        ([1], None, 1, (1, 1, 1)),
    ],
)
def test_all_gpus_have_engines_unless_fewer_are_asked_for(monkeypatch, gpus, engines, tensor, expected):
    config = sized(monkeypatch, gpus, engines, tensor)
    assert (config.rollout.engines, config.cluster.nodes, config.cluster.ranks_per_node) == expected
    places = engine_places(config.cluster, config.rollout)
    assert len({(place.node, gpu) for place in places for gpu in place.gpus}) == config.rollout.engines * tensor
    assert all(max(place.gpus) < config.cluster.ranks_per_node for place in places)


@pytest.mark.parametrize(("gpus", "engines", "tensor"), [([4], 5, 1), ([4, 4], None, 8), ([0], None, 1)])
def test_engines_that_do_not_fit_are_refused(monkeypatch, gpus, engines, tensor):
    with pytest.raises(UserError, match="lower --engines or --tensor"):
        sized(monkeypatch, gpus, engines, tensor)


def test_without_gpus_there_is_one_engine_unless_more_are_asked_for(monkeypatch):
    assert sized(monkeypatch, [0], None, device="cpu").rollout.engines == 1
    assert sized(monkeypatch, [0], 3, device="cpu").rollout.engines == 3
