"""Packed sequences give what each gives alone and what padded rectangles give, at every layout."""

from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.trainer.policy_group import scatter
from tests.actor.test_layouts import LAYOUTS
from tests.devices import tolerance
from tests.model import qwen_cases as cases
from tests.pairwise import in_turn

FORMS = {"packed": cases.PACKS, "one by one": cases.ONE_BY_ONE, "padded": cases.PACKS}
"""Tokens of a micro-batch."""
DISTINCT = {str(parallel): parallel for parallel, _ in LAYOUTS.values()}


@pytest.mark.parametrize(("layout", "model"), in_turn(DISTINCT, ["qwen3 tied", "qwen2 untied"]))
def test_packed_padded_and_single_sequences_are_equal(ranks, tmp_path_factory, model, layout):
    directory, parallel = str(cases.cached_model(tmp_path_factory, model)), DISTINCT[layout]
    steps = ranks.run(cases.world_size(parallel), step_in_each_form, directory, parallel)
    found = {form: whole([step[form] for step in steps], parallel) for form in FORMS}
    expected, expected_updates = found.pop("one by one")
    for forward, updates in found.values():
        for name in ("logprobs_R", "entropy_R", "fingerprints_BL"):
            assert np.abs(getattr(forward, name) - getattr(expected, name)).max() < tolerance(1e-5)
        for ours, theirs in zip(updates, expected_updates, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=tolerance(1e-5))
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance(1e-5))
            assert ours["grad_norm"] > 1e-3
    assert expected.fingerprints_BL.any(axis=1).sum() == cases.WITH_ANSWER


def step_in_each_form(_rank: int, directory: str, parallel: dict) -> dict:
    from meds_megatron.bench.rectangles import padded_rectangles

    layout = {name: size for name, size in parallel.items() if name != "data"}
    found = {}
    for form, tokens in FORMS.items():
        with padded_rectangles() if form == "padded" else nullcontext():
            found[form] = cases.whole_step(cases.make_policy(directory, layout), parallel, tokens)
    return found


def whole(steps: list[tuple], parallel: dict):
    """Forward outputs in the order of the batch, and updates added up over the ranks."""
    of_replicas = {tuple(rows): forward for rows, forward, _ in steps}
    assert len(of_replicas) == parallel.get("data", 1)
    rows = [np.array(rows) for rows in of_replicas]
    forward = scatter(list(of_replicas.values()), rows, cases.train_batch().drawn_lengths_B)
    return forward, cases.add_up([updates for _, _, updates in steps], parallel)


@pytest.mark.parametrize("model", ["qwen2 untied", "qwen3 tied"])
def test_an_answer_does_not_see_its_neighbours(ranks, tmp_path_factory, model):
    directory = str(cases.cached_model(tmp_path_factory, model))
    (apart,) = ranks.run(1, difference_by_neighbours, directory, False)
    (joined,) = ranks.run(1, difference_by_neighbours, directory, True)
    assert apart == 0.0
    assert joined > 1e-2, "the difference that the test would find if sequences were not kept apart"


def difference_by_neighbours(_rank: int, directory: str, joined: bool) -> float:
    """The largest difference that other tokens in the first and last sequence of a pack make to the one between them;
    with `joined` the pack is one sequence."""
    from meds_megatron.actor import microbatch
    from meds_megatron.model.attention import packed_sequences

    policy = cases.make_policy(directory, {})

    def bounds(lengths: list[int], device: str):
        return packed_sequences([sum(lengths)] if joined else lengths, device)

    def middle(seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        ends = [random.integers(0, cases.VOCAB, 9).tolist() for _ in range(2)]
        responses = [ends[0], list(range(10, 21)), ends[1]]
        logprobs = [[0.0] * len(response) for response in responses]
        batch = TrainBatch.of_responses([[1, 2, 3]] * 3, responses, logprobs, [4] * 3, [0] * 3)
        output = policy.forward(batch, [np.arange(3)])
        inside = slice(*batch.drawn_offsets_B1[1:3])
        return np.concatenate([output.logprobs_R[inside], output.entropy_R[inside], output.fingerprints_BL[1]])

    with mock.patch.object(microbatch, "packed_sequences", bounds):
        return float(np.abs(middle(0) - middle(1)).max())
