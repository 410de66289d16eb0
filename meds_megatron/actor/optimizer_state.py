"""State of the distributed optimizer: made at the start, and mapped to a checkpoint that any layout can read.

megatron-core's own mappings either read back under the same tensor- and pipeline-parallel layout only
(`dp_reshardable`), or gather all moments on every data-parallel rank first (`fully_reshardable`). Here each rank saves
the ranges that it owns, in the coordinates of the Hugging Face tensors: nothing is sent, nothing is stored twice.
"""

from collections.abc import Iterable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.flat_ranges import flat_start, range_slices

STATES = ("param", "exp_avg", "exp_avg_sq")
"""State of each parameter: its float32 weights and Adam's two moments."""
_KEY_PREFIX = "optimizer."


def is_optimizer_key(key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the optimizer, not to the model."""
    return key.startswith(_KEY_PREFIX)


def make_state(optimizer: MegatronOptimizer) -> None:
    """Makes the moments, as zeros, which Adam would otherwise do in its first step.

    They are then part of a checkpoint before the first step, and of the memory that vLLM finds in use.
    """
    for distributed in _distributed(optimizer):
        for group in distributed.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
            # A step of rate 0 changes no weight, also with weight decay.
            group["lr"] = 0.0
        distributed.optimizer.step()
        distributed.optimizer.zero_grad()
    set_step(optimizer, 0)


def step_of(optimizer: MegatronOptimizer) -> int:
    """Number of steps taken, on which Adam's bias correction depends."""
    steps = {int(step) for step in _steps(optimizer)}
    if len(steps) != 1:
        raise RuntimeError(f"the optimizer's parameters have taken different numbers of steps: {sorted(steps)}")
    return steps.pop()


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Sets the number of steps taken. torch counts them for each parameter, Transformer Engine for each group."""
    for distributed in _distributed(optimizer):
        for group in distributed.optimizer.param_groups:
            if "step" in group:
                group["step"] = step
        for state in distributed.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(step)


def sharded_state(optimizer: MegatronOptimizer, chunks: Iterable[nn.Module], shape: ModelShape) -> list[ShardedTensor]:
    """The weights and moments that this rank owns, as parts of `optimizer.STATE.HUGGING_FACE_NAME`.

    Their data is the optimizer's own memory, so that a load fills it in place. Rows of vocabulary padding are left out.
    """
    tp_rank, tp_size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    table = local_table(shape, tp_size)
    owners = {
        parameter: distributed
        for distributed in _distributed(optimizer)
        for parameter in distributed.model_param_group_index_map
    }
    parts = []
    for row, parameter in local_parameters(chunks, table, tp_size):
        if parameter not in owners:
            continue
        owned = owners[parameter]._get_model_param_range_map(parameter)["param"]
        state = owners[parameter]._get_main_param_and_optimizer_states(parameter)
        # Of equal values one is saved: of a tied head the embedding's, of replicated parameters the first rank's.
        replica_id = (int(row.copy), tp_rank if row.split is None else 0)
        for part in range_slices(row, tp_rank, tp_size, owned.start, owned.end):
            begin = flat_start(row, tp_size, part) - owned.start
            for name in STATES:
                data = state[name].detach().view(-1)[begin : begin + part.elements].view(part.size)
                parts.append(
                    ShardedTensor(
                        key=f"{_KEY_PREFIX}{name}.{part.hf_name}",
                        data=data,
                        dtype=data.dtype,
                        local_shape=part.size,
                        global_shape=table.hf_shapes[part.hf_name],
                        global_offset=part.hf_start,
                        axis_fragmentations=None,
                        replica_id=replica_id,
                    )
                )
    return parts


def _distributed(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _steps(optimizer: MegatronOptimizer) -> Iterator[int | Tensor]:
    for distributed in _distributed(optimizer):
        yield from (group["step"] for group in distributed.optimizer.param_groups if "step" in group)
        yield from (state["step"] for state in distributed.optimizer.state.values() if "step" in state)
