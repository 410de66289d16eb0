"""A loss or gradient that is not finite on one rank leaves weights and optimizer of all ranks as they were."""

import math

import numpy as np
import pytest
import torch

from tests.model import qwen_cases as cases

# Ends of parameters' names: tensor-parallel ranks have copies of a norm, and parts of the others.
ENDS = {"norm": "layernorm.weight", "split": "linear_fc2.weight"}
CASES = {
    # Layout, dtype, rank with the fault, and the fault: advantages of its rows, or the gradient of a weight.
    "DP2, a loss": (dict(data=2), "float32", 1, "advantages", math.nan),
    "DP2, a gradient": (dict(data=2), "float32", 1, "norm", math.inf),
    "DP2 in bfloat16": (dict(data=2), "bfloat16", 0, "split", math.nan),
    "TP2, a copied weight": (dict(tensor=2), "float32", 1, "norm", math.nan),
    "TP2, a split weight": (dict(tensor=2), "float32", 0, "split", -math.inf),
    "PP2, first stage": (dict(pipeline=2), "float32", 0, "norm", math.nan),
    "PP2, last stage": (dict(pipeline=2), "float32", 1, "split", math.nan),
    "PP2, a loss": (dict(pipeline=2), "float32", 1, "advantages", math.inf),
    "the norm alone": (dict(data=2), "float32", 0, "norm", 1e30),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_update_changes_nothing_on_any_rank(ranks, tmp_path_factory, case):
    directory = str(cases.cached_model(tmp_path_factory, "qwen3 tied"))
    for found in ranks.run(2, good_bad_good, directory, *CASES[case]):
        assert found["skipped"] == [False, True, False]
        after_good, after_bad, after_second = found["states"]
        assert len(after_good) > 10
        for name, value in after_good.items():
            assert torch.equal(after_bad[name], value), name
            assert value.isfinite().all() and after_second[name].isfinite().all(), name
        assert any(not torch.equal(after_second[name], value) for name, value in after_good.items())


def test_training_goes_on_as_if_the_bad_update_had_not_been(cpu_ranks, tmp_path_factory):
    directory = str(cases.cached_model(tmp_path_factory, "qwen3 tied"))
    with_bad = cpu_ranks.run(2, good_bad_good, directory, *CASES["DP2, a loss"])
    without = cpu_ranks.run(2, good_bad_good, directory, dict(data=2), "float32", None, "", 0.0)
    for found, expected in zip(with_bad, without, strict=True):
        assert expected["skipped"] == [False, False]
        for name, value in expected["states"][-1].items():
            assert torch.equal(found["states"][-1][name], value), name


def good_bad_good(
    rank: int, directory: str, parallel: dict, dtype: str, bad_rank: int | None, where: str, value: float
):
    """Three updates, the second with `value` on `bad_rank`, or without that two: which were skipped, and all states."""
    layout = {name: size for name, size in parallel.items() if name != "data"}
    policy = cases.make_policy(directory, layout, dtype=dtype)
    batch = cases.train_batch()
    batch.advantages_B = np.random.default_rng(1).standard_normal(cases.RESPONSES).astype(np.float32)
    batch.loss_weights_B = cases.loss_weights(batch, "token_mean")
    batch.logprobs_R = np.full_like(batch.rollout_logprobs_R, -5.0)
    work = cases.scheduled(batch, np.zeros(cases.RESPONSES, dtype=np.int64), parallel, cases.PACKS)
    data = rank if parallel.get("data") else 0
    mine, minibatches = batch.select(work.rows[data]), work.micro_batches[data]
    skipped, states = [], []
    for bad in (False, True, False) if bad_rank is not None else (False, False):
        spoilt_batch = mine.select(np.arange(len(mine)))
        hooks = []
        if bad and rank == bad_rank:
            if where == "advantages":
                spoilt_batch.advantages_B[0] = value
            else:
                named = [parameter for chunk in policy.chunks for parameter in chunk.named_parameters()]
                spoilt = next(parameter for name, parameter in named if name.endswith(ENDS[where]))
                hooks = [spoilt.register_hook(lambda gradient: torch.full_like(gradient, value))]
        (update,) = policy.update(spoilt_batch, minibatches, step=0)
        for hook in hooks:
            hook.remove()
        skipped.append(update.skipped)
        states.append(state_of(policy))
    return {"skipped": skipped, "states": states}


def state_of(policy) -> dict[str, torch.Tensor]:
    """Weights, and the optimizer's main weights, moments and step counts, as copies."""
    state = {f"{place} {name}": p for place, c in enumerate(policy.chunks) for name, p in c.named_parameters()}
    for part in policy.optimizer.chained_optimizers:
        for place, main in enumerate(part.get_parameters()):
            state[f"main {place}"] = main
            state |= {f"{name} {place}": value for name, value in part.optimizer.state[main].items()}
    return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in state.items()}
