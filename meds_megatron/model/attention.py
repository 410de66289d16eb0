"""Causal attention of packed sequences, and which implementation of the layers computes it."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn


def use_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's (it is installed and there is a GPU) or those of the local spec."""
    return HAVE_TE and torch.cuda.is_available()


def packed_sequences(lengths: list[int], device: str) -> PackedSeqParams:
    """Sequences of `lengths` tokens, one after the other, in megatron-core's `thd` layout."""
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    # Unfused rotary embeddings read the padded bounds on the host. There is no padding within sequences; a copy that
    # stays on the host spares each layer a wait for the device. Transformer Engine's fused ones read the device's.
    on_host = None if use_transformer_engine() else bounds
    longest, on_device = max(lengths), bounds.to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        cu_seqlens_q_padded=on_host,
        cu_seqlens_kv_padded=on_host,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


class PackedAttention(nn.Module):
    """Causal grouped-query attention within each of the packed sequences, where Transformer Engine is missing or has
    none, for float32.

    Replaces megatron-core's `core_attention`: query, key and value are [T, heads, head_dim] of this rank's heads, so is
    the result. torch's variable-length kernel for bfloat16 on a GPU, and else sequence by sequence.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.context_group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])).cp

    def forward(
        self,
        query_TND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        assert packed_seq_params is not None
        sequences, gqa = packed_seq_params, query_TND.shape[1] != key_TGD.shape[1]
        if query_TND.is_cuda and query_TND.dtype is torch.bfloat16 and self.context_group.size() == 1:
            attended = varlen_attn(
                query_TND,
                key_TGD,
                value_TGD,
                sequences.cu_seqlens_q,
                sequences.cu_seqlens_kv,
                sequences.max_seqlen_q,
                sequences.max_seqlen_kv,
                scale=self.softmax_scale,
                window_size=(-1, 0),
                enable_gqa=gqa,
            )
            assert isinstance(attended, Tensor)
            return attended
        on_host = sequences.cu_seqlens_q_padded
        bounds = sequences.cu_seqlens_q if on_host is None else on_host
        lengths = [end - begin for begin, end in pairwise(bounds.tolist())]
        group = self.context_group
        if group.size() > 1:
            key_TGD, value_TGD = (_gathered(part, lengths, group) for part in (key_TGD, value_TGD))
        queries = query_TND.split([length // group.size() for length in lengths])
        sequences = zip(queries, key_TGD.split(lengths), value_TGD.split(lengths), strict=True)
        chunks = (chunk for sequence in sequences for chunk in _chunks(*sequence, group))
        return torch.cat([_attend(*chunk, self.softmax_scale, gqa) for chunk in chunks])


def context_slice(lengths: list[int], rank: int, size: int) -> np.ndarray:
    """Places, among the packed tokens of sequences of `lengths`, of those that context-parallel rank `rank` of `size`
    holds, in its order.

    Each sequence is cut into 2 * size equal chunks, of which a rank holds the one as far from the head as the other is
    from the tail: causal attention then takes all ranks the same time.
    """
    if size == 1:
        return np.arange(sum(lengths))
    held = []
    for begin, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
        chunk = length // (2 * size)
        held += [begin + number * chunk + np.arange(chunk) for number in _chunk_numbers(rank, size)]
    return np.concatenate(held)


def _chunk_numbers(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _gathered(local_TGD: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' tokens in the order of the sequences; the backward pass adds up the ranks' gradients."""
    all_TGD = gather_from_sequence_parallel_region(local_TGD, group=group)
    order = np.argsort(np.concatenate([context_slice(lengths, rank, group.size()) for rank in range(group.size())]))
    return all_TGD.index_select(0, torch.from_numpy(order).to(all_TGD.device))


def _chunks(
    query_SND: Tensor, key_KGD: Tensor, value_KGD: Tensor, group: dist.ProcessGroup
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's queries of one sequence with the keys and values up to their ends."""
    if group.size() == 1:
        yield query_SND, key_KGD, value_KGD
        return
    size = len(query_SND) // 2
    for number, query_CND in zip(_chunk_numbers(group.rank(), group.size()), query_SND.split(size), strict=True):
        end = (number + 1) * size
        yield query_CND, key_KGD[:end], value_KGD[:end]


def _attend(query_SND: Tensor, key_KGD: Tensor, value_KGD: Tensor, scale: float | None, gqa: bool) -> Tensor:
    """Causal attention of the last S of K tokens of one sequence, [S, heads, head_dim]."""
    query, key, value = (t.transpose(0, 1)[None] for t in (query_SND, key_KGD, value_KGD))
    queries, keys = len(query_SND), len(key_KGD)
    mask_SK = None
    if queries < keys:
        mask_SK = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    context_1NSD = F.scaled_dot_product_attention(
        query, key, value, mask_SK, is_causal=mask_SK is None, scale=scale, enable_gqa=gqa
    )
    return context_1NSD[0].transpose(0, 1)
