"""Functions that the ranks of the checkpoint tests run."""

import os
import random
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from meds_megatron.actor import checkpoint, optimizer_state
from meds_megatron.actor.background_save import HostCopies
from meds_megatron.weights.chunks import local_parameters, local_table, rank_parameters
from meds_megatron.weights.table import canonical_name
from tests.devices import this_device
from tests.model import qwen_cases as cases

State = dict[str, np.ndarray]
"""Whole tensors under `param|exp_avg|exp_avg_sq NAME` and `weight NAME`, NAME that of the Hugging Face tensor."""


def train_and_save(rank: int, directory: str, parallel: dict, target: str, steps: int, dtype: str = "float32") -> State:
    """The state after `steps` steps of training, which is saved while another step changes it, after a first save."""
    policy = make_policy(directory, parallel, dtype)
    copies = HostCopies()
    first = Path(f"{target}-first")
    first.mkdir(exist_ok=True)
    checkpoint.PolicySave(*parts(policy), first, copies).finish()
    for _ in range(steps):
        cases.train_step(policy, parallel)
    state = whole_state(policy)
    save = checkpoint.PolicySave(*parts(policy), target, copies)
    cases.train_step(policy, parallel)
    save.finish()
    return state


def save_with_digests(rank: int, directory: str, parallel: dict, target: str) -> dict[str, str]:
    """Digests, by name, of the files that this rank has written."""
    policy = make_policy(directory, parallel)
    cases.train_step(policy, parallel)
    return checkpoint.PolicySave(*parts(policy), target, HostCopies()).finish()


def load_state(rank: int, directory: str, parallel: dict, target: str, dtype: str = "float32") -> State:
    """The state of a new policy after it was loaded."""
    policy = make_policy(directory, parallel, dtype)
    checkpoint.load(*parts(policy), target, same_layout=False)
    return whole_state(policy)


def losses_uninterrupted(rank: int, directory: str, parallel: dict, target: str) -> list[list[dict]]:
    """Four steps of training, saved in the middle."""
    policy = make_policy(directory, parallel)
    losses = [cases.train_step(policy, parallel) for _ in range(2)]
    checkpoint.PolicySave(*parts(policy), target, HostCopies()).finish()
    return losses + [cases.train_step(policy, parallel) for _ in range(2)]


def losses_resumed(rank: int, directory: str, parallel: dict, target: str) -> list[list[dict]]:
    """The last two of the four steps."""
    policy = make_policy(directory, parallel)
    checkpoint.load(*parts(policy), target, same_layout=True)
    return [cases.train_step(policy, parallel) for _ in range(2)]


def random_numbers(rank: int, directory: str, parallel: dict, target: str, resumed: bool) -> list[float]:
    """Numbers drawn from every generator, after a save or after a load in a process that has drawn others."""
    policy = make_policy(directory, parallel)
    draw_random_numbers()
    if resumed:
        draw_random_numbers()
        checkpoint.load(*parts(policy), target, same_layout=True)
    else:
        checkpoint.PolicySave(*parts(policy), target, HostCopies()).finish()
    return draw_random_numbers()


def save_where_one_rank_cannot(rank: int, directory: str, parallel: dict, target: str, limit: int) -> str:
    """Error of a save on this rank when rank 1 cannot write files of more than `limit` bytes."""
    import resource
    import signal

    policy = make_policy(directory, parallel)
    save = checkpoint.PolicySave.__new__(checkpoint.PolicySave)
    if rank == 1:
        # Without the signal a write beyond the limit is an OSError.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save.__init__(*parts(policy), target, HostCopies())
        save.finish()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def load_error(rank: int, directory: str, parallel: dict, target: str) -> str:
    """Error of a load."""
    policy = make_policy(directory, parallel)
    try:
        checkpoint.load(*parts(policy), target, same_layout=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def load_error_where_torch_unpickles(rank: int, directory: str, parallel: dict, target: str) -> str:
    """Error of a load where torch's own default is to run any pickle."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return load_error(rank, directory, parallel, target)


def draw_random_numbers() -> list[float]:
    with get_cuda_rng_tracker().fork():
        megatron = torch.rand((), device=this_device()).item()
    device = torch.rand((), device=this_device()).item()
    return [random.random(), float(np.random.rand()), torch.rand(()).item(), device, megatron]


def make_policy(directory: str, parallel: dict, dtype: str = "float32"):
    layout = {name: size for name, size in parallel.items() if name != "data"}
    return cases.make_policy(directory, layout, dtype=dtype)


def parts(policy) -> tuple:
    return policy.chunks, policy.optimizer, policy.shape


def whole_state(policy) -> State:
    """The state of all ranks: gathered by megatron-core over data-parallel ranks, and over the others here."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    local: dict[str, np.ndarray] = {"step": np.array(optimizer_state.step_of(policy.optimizer))}
    table = local_table(policy.shape, tp_size)
    names = {parameter: row for row, parameter in local_parameters(policy.chunks, table, tp_size)}
    for name, parameter in rank_parameters(policy.chunks, policy.shape, tp_size).items():
        local[f"weight {name}"] = parameter.detach().float().cpu().numpy()
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        gathered = optimizer.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        for number, buffer in enumerate(optimizer.buffers):
            (flat,) = gathered[number].values()
            for parameter, (first, stop, _) in buffer.param_index_map.items():
                for state in optimizer_state.STATES:
                    values = flat[state][first:stop].view(parameter.shape).cpu().numpy()
                    if not names[parameter].copy:
                        local[f"{state} {names[parameter].name}"] = values
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (tp_rank, local))
    whole: State = {"step": local["step"]}
    for rank, state in everyone:
        for key, values in state.items():
            kind, _, name = key.partition(" ")
            if not name:
                continue
            row = table.parameters[canonical_name(name)]
            for part in row.slices(rank, tp_size):
                target = whole.setdefault(f"{kind} {part.hf_name}", np.full(table.hf_shapes[part.hf_name], np.nan))
                target[part.hf_slices()] = values[part.local_slices()]
    return whole
