"""From the parameters of a rank to Hugging Face tensors, one layer at a time."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.table import Entry


def iterate_hf(
    model_chunks: Iterable[nn.Module], shape: ModelShape, tp_group: dist.ProcessGroup
) -> Iterator[dict[str, Tensor]]:
    """The Hugging Face tensors of this pipeline stage, whole, one dict for each group: embedding, layer, final norm
    and head, in the order of the model.

    A collective of the tensor-parallel group: all its ranks iterate to the end; rank 0 gets the tensors, the others
    empty dicts. Vocabulary padding is cut off and a tied head is left out. Tensors are in the model's dtype, on its
    device, and may be the parameters themselves: copy what must outlive an update. Beside the model, memory holds one
    group and the shards of the parameter being gathered.
    """
    table = local_table(shape, tp_group.size())
    groups: dict[int, list[tuple[Entry, Tensor]]] = {}
    for entry, parameter in local_parameters(model_chunks, table, tp_group.size()):
        if not entry.copy:
            groups.setdefault(entry.group, []).append((entry, parameter.detach()))
    for group in sorted(groups):
        tensors: dict[str, Tensor] = {}
        for entry, parameter in groups[group]:
            tensors |= whole_tensors(entry, parameter, tp_group)
        yield tensors


def merge(entry: Entry, shards: list[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a parameter from its shards on all tensor-parallel ranks (one, if not split)."""
    whole = _empty_tensors(entry, shards[0])
    for rank, shard in enumerate(shards):
        for piece in entry.pieces(rank, len(shards)):
            whole[piece.hf_name][piece.hf_slices()] = shard[piece.local_slices()]
    return whole


def whole_tensors(entry: Entry, local: Tensor, tp_group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The Hugging Face tensors of one parameter on rank 0 of the group, nothing on the others; all ranks call it."""
    if tp_group.size() == 1 or entry.split is None:
        if tp_group.rank() != 0:
            return {}
        shapes = entry.hf_shapes()
        if list(shapes.values()) == [tuple(local.shape)]:
            return {next(iter(shapes)): local}
        return merge(entry, [local])
    if tp_group.rank() != 0:
        dist.gather(local.contiguous(), group_dst=0, group=tp_group)
        return {}
    whole = _empty_tensors(entry, local)
    buffers, elsewhere = _receive_buffers(entry, local, whole, tp_group.size())
    dist.gather(local.contiguous(), buffers, group_dst=0, group=tp_group)
    for rank in elsewhere:
        for piece in entry.pieces(rank, tp_group.size()):
            whole[piece.hf_name][piece.hf_slices()] = buffers[rank][piece.local_slices()]
    return whole


def _receive_buffers(
    entry: Entry, local: Tensor, whole: dict[str, Tensor], tp_size: int
) -> tuple[list[Tensor], list[int]]:
    """Where each rank's shard is received: in its place of the whole tensor if it lies there in one run of memory.

    Returns the buffers and the ranks whose shards have to be copied into place afterwards.
    """
    buffers, elsewhere = [], []
    for rank in range(tp_size):
        pieces = list(entry.pieces(rank, tp_size))
        if len(pieces) == 1 and entry.split == 0 and pieces[0].size == tuple(local.shape):
            buffers.append(whole[pieces[0].hf_name][pieces[0].hf_slices()])
        else:
            buffers.append(torch.empty_like(local))
            elsewhere.append(rank)
    return buffers, elsewhere


def _empty_tensors(entry: Entry, like: Tensor) -> dict[str, Tensor]:
    return {name: like.new_empty(shape) for name, shape in entry.hf_shapes().items()}
