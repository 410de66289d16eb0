"""The Megatron policy against transformers, at every layout."""

import numpy as np
import pytest
import torch

from meds_megatron.actor.train_batch import scatter_ragged
from tests.devices import tolerance
from tests.model import qwen_cases as cases
from tests.pairwise import in_turn, pairwise

LAYOUTS = {
    "TP1": {},
    "TP2": dict(tensor=2),
    "TP4": dict(tensor=4),
    "PP2": dict(pipeline=2),
    "PP4": dict(pipeline=4),
    "TP2xPP2+SP": dict(tensor=2, pipeline=2, sequence=True),
    "PP2xVPP2": dict(pipeline=2, virtual_pipeline=2),
    "TP2xPP2xVPP2+SP": dict(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
    "CP2": dict(context=2),
    "TP2xCP2xPP2+SP": dict(tensor=2, context=2, pipeline=2, sequence=True),
    "PP2 uneven": dict(pipeline=2, first_stage_layers=3),
}


@pytest.mark.parametrize(("family", "head", "layout"), pairwise(["qwen2", "qwen3"], ["tied", "untied"], LAYOUTS))
def test_logprobs_entropy_and_fingerprints_match_transformers(ranks, model_dirs, family, head, layout):
    model, parallel = f"{family} {head}", LAYOUTS[layout]
    expected = cases.transformers_answers(model_dirs[model])
    results = ranks.run(cases.world_size(parallel), cases.forward, str(model_dirs[model]), parallel)
    (found,) = [result for result in results if result is not None]
    assert np.abs(found.logprobs_R - expected.logprobs_R).max() < tolerance(1e-4)
    assert np.abs(found.entropy_R - expected.entropy_R).max() < tolerance(1e-4)
    assert np.abs(found.fingerprints_BL - expected.fingerprints_BL).max() < tolerance(1e-4)
    assert expected.fingerprints_BL.any(axis=1).sum() == cases.WITH_ANSWER
    one_rank = cases.on_one_rank(ranks, model_dirs[model])
    assert np.abs(found.fingerprints_BL - one_rank.fingerprints_BL).max() < tolerance(1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        dict(pipeline=3),
        dict(pipeline=4, first_stage_layers=1),
        dict(pipeline=2, virtual_pipeline=3),
        dict(tensor=2, sequence=True, pipeline=3, virtual_pipeline=2),
    ],
    ids=str,
)
def test_layers_that_do_not_divide_over_the_stages_match_transformers(ranks, seven_layers, parallel):
    expected = cases.transformers_answers(seven_layers)
    results = ranks.run(cases.world_size(parallel), cases.forward, str(seven_layers), parallel)
    (found,) = [result for result in results if result is not None]
    assert np.abs(found.logprobs_R - expected.logprobs_R).max() < tolerance(1e-4)
    assert np.abs(found.entropy_R - expected.entropy_R).max() < tolerance(1e-4)
    assert np.abs(found.fingerprints_BL - expected.fingerprints_BL).max() < tolerance(1e-4)


@pytest.mark.parametrize(
    ("layout", "norm"), in_turn(["TP1", "PP2 uneven", "TP2xPP2+SP", "TP2xPP2xVPP2+SP"], ["all", "none"])
)
def test_layers_that_pass_the_final_norm_are_configurable(ranks, model_dirs, norm, layout):
    directory, parallel = model_dirs["qwen3 untied"], LAYOUTS[layout]
    expected = cases.transformers_answers(directory, norm)
    results = ranks.run(cases.world_size(parallel), cases.forward, str(directory), parallel, cases.PAIRS, norm)
    (found,) = [result for result in results if result is not None]
    assert np.abs(found.fingerprints_BL - expected.fingerprints_BL).max() < tolerance(1e-4)
    assert np.abs(expected.fingerprints_BL - cases.transformers_answers(directory).fingerprints_BL).max() > 0.1


@pytest.mark.parametrize(
    ("layout", "tokens"),
    in_turn(["TP1", "CP2", "PP2xVPP2", "TP2xPP2+SP"], [cases.ONE_BY_ONE, cases.PAIRS, 2 * cases.PACKS]),
)
def test_values_belong_to_their_responses_in_any_order(ranks, model_dirs, tokens, layout):
    directory, parallel = model_dirs["qwen2 tied"], LAYOUTS[layout]
    order = np.random.default_rng(tokens).permutation(cases.RESPONSES)
    results = ranks.run(cases.world_size(parallel), cases.forward_in_order, str(directory), parallel, tokens, order)
    (found,) = [result for result in results if result is not None]
    expected = cases.on_one_rank(ranks, directory)
    assert np.abs(found.fingerprints_BL - expected.fingerprints_BL[order]).max() < tolerance(1e-5)
    lengths_B = cases.train_batch().drawn_lengths_B[order]
    back = scatter_ragged([found.logprobs_R], [order], lengths_B[np.argsort(order)])
    assert np.abs(back - expected.logprobs_R).max() < tolerance(1e-5)


@pytest.mark.parametrize("layout", ["TP1", "TP2xPP2+SP"])
def test_bfloat16_weights_give_float32_values(ranks, tmp_path, layout):
    directory = cases.make_model(tmp_path / "model", "qwen3 untied", spread=0.0)
    parallel = LAYOUTS[layout]
    results = ranks.run(
        cases.world_size(parallel), cases.forward, str(directory), parallel, cases.PAIRS, "last", "bfloat16"
    )
    (found,) = [result for result in results if result is not None]
    expected = cases.transformers_answers(directory).fingerprints_BL
    assert np.abs(found.fingerprints_BL - expected).max() < 2e-2
    values_N = torch.from_numpy(found.fingerprints_BL[found.fingerprints_BL != 0])
    assert (values_N.bfloat16().float() != values_N).float().mean() > 0.9


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_bytes_between_stages_are_what_the_shapes_say(ranks, model_dirs, stages):
    sent = sum(ranks.run(stages, cases.bytes_sent, str(model_dirs["qwen2 untied"]), {"pipeline": stages}))
    rows, result = cases.WITH_ANSWER * cases.HIDDEN * 4, cases.WITH_ANSWER * cases.LAYERS * 4
    assert sent == (rows * (stages - 1) + result * stages if stages > 1 else 0)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    return {name: cases.cached_model(tmp_path_factory, name) for name in cases.MODELS}


@pytest.fixture(scope="module")
def seven_layers(tmp_path_factory):
    return cases.make_model(tmp_path_factory.mktemp("models") / "seven layers", "qwen3 tied", layers=7)


def test_models_differ(model_dirs):
    """Guards the comparison itself: the four models really give different answers."""
    answers = [cases.transformers_answers(path).logprobs_R for path in model_dirs.values()]
    assert all(not torch.allclose(torch.tensor(a), torch.tensor(answers[0])) for a in answers[1:])
