"""The Megatron policy against transformers, at every layout."""

import numpy as np
import pytest
import torch

from tests.model import qwen_cases as cases

LAYOUTS = {
    "TP1": dict(),
    "TP2": dict(tensor=2),
    "TP4": dict(tensor=4),
    "PP2": dict(pipeline=2),
    "PP4": dict(pipeline=4),
    "TP2xPP2+SP": dict(tensor=2, pipeline=2, sequence=True),
    "PP2xVPP2": dict(pipeline=2, virtual_pipeline=2),
    "TP2xPP2xVPP2+SP": dict(tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
    "PP2 uneven": dict(pipeline=2, first_stage_layers=3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", cases.MODELS)
def test_logprobs_entropy_and_fingerprints_match_transformers(ranks, model_dirs, model, layout):
    parallel = LAYOUTS[layout]
    world_size = parallel.get("tensor", 1) * parallel.get("pipeline", 1)
    expected = cases.transformers_answers(model_dirs[model])
    results = ranks.run(world_size, cases.forward, str(model_dirs[model]), parallel)
    (found,) = [result for result in results if result is not None]
    assert np.abs(found.logprobs_R - expected.logprobs_R).max() < 1e-4
    assert np.abs(found.entropy_R - expected.entropy_R).max() < 1e-4
    assert np.abs(found.fingerprints_BL - expected.fingerprints_BL).max() < 1e-4
    assert expected.fingerprints_BL.any(axis=1).sum() == cases.WITH_ANSWER


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    return {name: cases.cached_model(tmp_path_factory, name) for name in cases.MODELS}


def test_models_differ(model_dirs):
    """Guards the comparison itself: the four models really give different answers."""
    answers = [cases.transformers_answers(path).logprobs_R for path in model_dirs.values()]
    assert all(not torch.allclose(torch.tensor(a), torch.tensor(answers[0])) for a in answers[1:])
