"""GPU memory that a rank leaves to engines: training and checkpoints are the same with and without."""

import numpy as np
import pytest

from tests.actor import checkpoint_ranks
from tests.actor.checkpoint_ranks import make_policy, parts, whole_state
from tests.model import qwen_cases as cases

LAYOUTS = [({}, "float32"), (dict(data=2), "bfloat16"), (dict(pipeline=2), "float32"), (dict(tensor=2), "bfloat16")]


def three_steps(rank: int, directory: str, parallel: dict, dtype: str, target: str | None) -> dict[str, np.ndarray]:
    """The state after three steps of training; with `target` the memory is free between them, and after the second the
    state is saved there."""
    from meds_megatron.actor import checkpoint
    from meds_megatron.actor.background_save import HostCopies
    from meds_megatron.actor.offload import Offload

    policy = make_policy(directory, parallel, dtype)
    offload = Offload(policy._wrapped, policy.optimizer, moves_optimizer=True)
    for step in range(3):
        if target is not None:
            before = addresses(policy)
            offload.offload()
            offload.offload()
            buffers = [buffer for chunk in policy._wrapped for buffer in chunk.buffers]
            assert all(buffer.grad_data.untyped_storage().nbytes() == 0 for buffer in buffers)
            moved = [name for name, address in addresses(policy).items() if address != before[name]]
            assert len(moved) == len(before) * (2 if dtype == "float32" else 3) // 3
            if step == 2:
                checkpoint.PolicySave(*parts(policy), target, HostCopies()).finish()
            offload.onload()
            offload.onload()
        cases.train_step(policy, parallel)
    return whole_state(policy)


def addresses(policy) -> dict[tuple[int, str], int]:
    """Address of each main weight and moment of the optimizer."""
    found = {}
    for number, (main, state) in enumerate(policy.optimizer.chained_optimizers[0].optimizer.state.items()):
        tensors = {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        found |= {(number, name): tensor.data_ptr() for name, tensor in tensors.items()}
    return found


def two_steps(rank: int, directory: str, parallel: dict, dtype: str) -> dict[str, np.ndarray]:
    policy = make_policy(directory, parallel, dtype)
    for _ in range(2):
        cases.train_step(policy, parallel)
    return whole_state(policy)


@pytest.mark.parametrize(("parallel", "dtype"), LAYOUTS, ids=str)
def test_training_and_checkpoints_are_the_same_to_the_last_bit(ranks, tmp_path_factory, tmp_path, parallel, dtype):
    directory, world = str(cases.cached_model(tmp_path_factory, "qwen3 tied")), 2 if parallel else 1
    expected = ranks.run(world, three_steps, directory, parallel, dtype, None)
    found = ranks.run(world, three_steps, directory, parallel, dtype, str(tmp_path))
    saved = ranks.run(world, checkpoint_ranks.load_state, directory, parallel, str(tmp_path), dtype)
    after_two = ranks.run(world, two_steps, directory, parallel, dtype)
    for one, other in [(expected, found), (after_two, saved)]:
        for theirs, ours in zip(one, other, strict=True):
            assert theirs.keys() == ours.keys() and len(theirs) > 10
            assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)


def test_an_optimizer_that_stays_is_not_moved(ranks, tmp_path_factory):
    directory = str(cases.cached_model(tmp_path_factory, "qwen3 tied"))
    assert ranks.run(1, freed_without_the_optimizer, directory) == [True]


def freed_without_the_optimizer(rank: int, directory: str) -> bool:
    policy = make_policy(directory, {}, "bfloat16")
    before = addresses(policy)
    policy.offload.offload()
    assert policy._wrapped[0].buffers[0].grad_data.untyped_storage().nbytes() == 0
    return addresses(policy) == before
