"""Predicted traffic of weight updates."""

from math import prod

import pytest

from meds_megatron.bench.reshard_forecast import PLANS, gathered_bytes, predicted
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.config.model_shape import QWEN
from meds_megatron.plan.network import predict
from meds_megatron.weights.resharding.plan import ReshardPlan, find_routes


@pytest.mark.parametrize("row", PLANS, ids=lambda row: f"{row[0]} engines on {row[-1] or 'shared'} nodes")
def test_plans_of_large_models_move_less_than_a_gather(row):
    plan = predicted(*row, network_gbit=400, local_gbyte=100)
    moved = plan["network_gib"] + plan["local_gib"]
    assert 0 < moved <= plan["gather_gib"]
    assert plan["predicted_s"] > 0
    assert (plan["local_gib"] == 0) == (plan["placement"] == "disaggregated")


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "engine_nodes"), [("Qwen2.5-7B", 4, 2, [0, 0]), ("Qwen2.5-72B", 8, 4, [0, 1, 2, 3])]
)
def test_traffic_is_what_the_engines_need_and_the_busiest_connection_decides(name, tensor, pipeline, engine_nodes):
    layout = ParallelLayout(tensor=tensor, pipeline=pipeline)
    plan = ReshardPlan(QWEN[name], layout, tensor)
    nodes = [rank // 8 for rank in range(layout.ranks)]
    routes = find_routes(layout, nodes, engine_nodes)
    traffic = predict(
        plan, routes, nodes, engine_nodes, item_bytes=2, local_bytes_per_second=1e11, network_bytes_per_second=1e10
    )
    assert any(parameter.split is not None for parameter in plan.table.stored)
    model = 2 * sum(map(prod, plan.table.hf_shapes.values()))
    norms = 2 * sum(prod(s) for n, s in plan.table.hf_shapes.items() if "norm" in n)
    needed = (model + (tensor - 1) * norms) * len(engine_nodes)
    assert traffic.local_bytes + traffic.network_bytes == needed
    assert gathered_bytes(plan, len(engine_nodes), item_bytes=2) > 2 * needed
    shares = len(engine_nodes) * (1 if pipeline == 2 else pipeline)
    if pipeline == 2:
        assert traffic.network_bytes == 0 and traffic.seconds == traffic.local_seconds
        assert traffic.local_seconds == pytest.approx(needed / shares / tensor / 1e11, rel=0.01)
    else:
        # Each node receives what the other three have.
        assert traffic.network_bytes == pytest.approx(needed * 3 / 4, rel=0.01)
        assert traffic.seconds == pytest.approx(needed * 3 / 16 / 1e10, rel=0.1)
