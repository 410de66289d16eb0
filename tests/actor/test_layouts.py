"""The same batch gives the same update at every layout."""

import numpy as np
import pytest

from tests.devices import tolerance
from tests.model import qwen_cases as cases
from tests.pairwise import in_turn

LAYOUTS = {
    "packs": ({}, cases.PACKS),
    "pairs": ({}, cases.PAIRS),
    "TP2": (dict(tensor=2), cases.ONE_BY_ONE),
    "TP2+SP": (dict(tensor=2, sequence=True), cases.PAIRS),
    "PP2": (dict(pipeline=2), cases.ONE_BY_ONE),
    "PP2 packs": (dict(pipeline=2), cases.PACKS),
    "PP2xVPP2": (dict(pipeline=2, virtual_pipeline=2), cases.ONE_BY_ONE),
    "PP3, layers do not divide": (dict(pipeline=3), cases.ONE_BY_ONE),
    "DP2": (dict(data=2), cases.ONE_BY_ONE),
    "DP2 packs": (dict(data=2), cases.PACKS),
    "DP2xPP2": (dict(data=2, pipeline=2), cases.PAIRS),
    "TP2xPP2+SP": (dict(tensor=2, pipeline=2, sequence=True), cases.PAIRS),
    "CP2": (dict(context=2), cases.PACKS),
    "CP2 one by one": (dict(context=2), cases.ONE_BY_ONE),
    "CP2xDP2": (dict(context=2, data=2), cases.PAIRS),
    "TP2xCP2xPP2+SP": (dict(tensor=2, context=2, pipeline=2, sequence=True), cases.PACKS),
    "TP2xDP2": (dict(tensor=2, data=2), cases.ONE_BY_ONE),
}
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]


@pytest.mark.parametrize(("layout", "model"), in_turn(LAYOUTS, ["qwen2 untied", "qwen3 tied"]))
def test_same_loss_and_gradient_norm_as_on_one_rank(ranks, tmp_path_factory, model, layout):
    directory = cases.cached_model(tmp_path_factory, model)
    expected = update(ranks, directory, {}, cases.ONE_BY_ONE)
    found = update(ranks, directory, *LAYOUTS[layout])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance(1e-5))
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance(1e-5))
        assert ours["grad_norm"] > 1e-3
    assert np.abs(np.subtract(found[0]["kl"], 0.0)) < 1e-7


@pytest.mark.parametrize(
    ("objective", "layout"),
    in_turn(
        [*((name, "ppo") for name in AGGREGATIONS), ("sequence_mean", "gspo"), ("token_mean", "cispo")],
        ["DP2xPP2", "CP2"],
    ),
)
def test_every_aggregation_and_loss_is_global(ranks, tmp_path_factory, objective, layout):
    (aggregation, loss), (layout, _) = objective, LAYOUTS[layout]
    directory = cases.cached_model(tmp_path_factory, "qwen3 tied")
    expected = update(ranks, directory, {}, cases.ONE_BY_ONE, aggregation, loss)
    found = update(ranks, directory, layout, cases.PACKS, aggregation, loss)
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], abs=tolerance(1e-5))
    assert found[1]["grad_norm"] == pytest.approx(expected[1]["grad_norm"], rel=tolerance(1e-5))


_known: dict[tuple, list[dict]] = {}


def update(
    ranks, directory, parallel: dict, tokens: int, aggregation: str = "token_mean", loss: str = "ppo"
) -> list[dict]:
    """Loss, gradient norm and KL of both updates of the training step, added up over the data-parallel ranks."""
    key = (str(directory), tuple(parallel.items()), tokens, aggregation, loss)
    if key not in _known:
        arguments = (str(directory), parallel, tokens, aggregation, loss)
        results = ranks.run(cases.world_size(parallel), cases.forward_and_update, *arguments)
        _known[key] = cases.add_up(results, parallel)
    return _known[key]
