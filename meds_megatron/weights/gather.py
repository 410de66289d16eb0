"""Gathering of the parameters of a rank into Hugging Face tensors, one bucket at a time."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.chunks import local_table, rank_parameters
from meds_megatron.weights.table import MegatronParameter


def iterate_hf(
    model_chunks: Iterable[nn.Module], shape: ModelShape, tp_group: dist.ProcessGroup
) -> Iterator[dict[str, Tensor]]:
    """The whole Hugging Face tensors of this pipeline stage, one dict for each bucket, in the order of the model.

    A collective of the tensor-parallel group: all its ranks iterate to the end; rank 0 gets the tensors, the others
    empty dicts. Vocabulary padding is cut off and a tied head is left out. Tensors are in the model's dtype, on its
    device, and may be the parameters themselves: copy a tensor that must outlive an update. Besides the model, memory
    holds one bucket and the shards of the parameter being gathered.
    """
    held = rank_parameters(model_chunks, shape, tp_group.size())
    for bucket in local_table(shape, tp_group.size()).buckets:
        tensors: dict[str, Tensor] = {}
        for parameter in bucket:
            if parameter.name in held:
                tensors |= whole_tensors(parameter, held[parameter.name].detach(), tp_group)
        if bucket[0].name in held:
            yield tensors


def merge(parameter: MegatronParameter, shards: list[Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a parameter from its shards on all tensor-parallel ranks (one, if not split)."""
    whole = _empty_tensors(parameter, shards[0])
    for rank, shard in enumerate(shards):
        for part in parameter.slices(rank, len(shards)):
            whole[part.hf_name][part.hf_slices()] = shard[part.local_slices()]
    return whole


def whole_tensors(parameter: MegatronParameter, local: Tensor, tp_group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The Hugging Face tensors of one parameter on rank 0 of the group, nothing on the others; all ranks call it."""
    size, first = tp_group.size(), tp_group.rank() == 0
    if size == 1 or parameter.split is None:
        shapes = parameter.hf_shapes()
        if list(shapes.values()) == [tuple(local.shape)]:
            return dict.fromkeys(shapes, local) if first else {}
        return merge(parameter, [local]) if first else {}
    if not first:
        dist.gather(local.contiguous(), group_dst=0, group=tp_group)
        return {}
    whole = _empty_tensors(parameter, local)
    slices = [list(parameter.slices(rank, size)) for rank in range(size)]
    # A shard that is one run of memory of the whole tensor is received in its place, the others are copied there.
    in_place = [parameter.split == 0 and len(s) == 1 and s[0].size == tuple(local.shape) for s in slices]
    shards = [
        whole[parts[0].hf_name][parts[0].hf_slices()] if placed else torch.empty_like(local)
        for parts, placed in zip(slices, in_place, strict=True)
    ]
    dist.gather(local.contiguous(), shards, group_dst=0, group=tp_group)
    for shard, parts, placed in zip(shards, slices, in_place, strict=True):
        for part in [] if placed else parts:
            whole[part.hf_name][part.hf_slices()] = shard[part.local_slices()]
    return whole


def _empty_tensors(parameter: MegatronParameter, like: Tensor) -> dict[str, Tensor]:
    return {name: like.new_empty(shape) for name, shape in parameter.hf_shapes().items()}
