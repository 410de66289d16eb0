import pytest

from meds_megatron.bench.reshard_forecast import PLANS, predicted


@pytest.mark.parametrize("row", PLANS, ids=lambda row: f"{row[0]} engines on {row[-1] or 'shared'} nodes")
def test_plans_of_large_models_move_less_than_a_gather(row):
    plan = predicted(*row, network_gbit=400, local_gbyte=100)
    moved = plan["network_gib"] + plan["local_gib"]
    assert 0 < moved <= plan["gather_gib"]
    assert plan["predicted_s"] > 0
    assert (plan["local_gib"] == 0) == (plan["placement"] == "disaggregated")
