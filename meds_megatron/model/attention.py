"""Causal attention of packed sequences, and which implementation of the layers computes it."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
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
    """Causal grouped-query attention within each of the packed sequences, where there is no Transformer Engine.

    Replaces megatron-core's `core_attention`: query, key and value are [T, heads, head_dim] of this rank's heads, so is
    the result. torch's variable-length kernel on a GPU, and sequence by sequence on a CPU.
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
        if config.context_parallel_size != 1:
            raise NotImplementedError("PackedAttention holds whole sequences: context_parallel_size must be 1")
        self.softmax_scale = softmax_scale

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
        sequences, gqa = packed_seq_params, query_TND.shape[1] != key_TGD.shape[1]
        if query_TND.is_cuda:
            return varlen_attn(
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
        lengths = [end - begin for begin, end in pairwise(sequences.cu_seqlens_q_padded.tolist())]
        parts = zip(*(packed.split(lengths) for packed in (query_TND, key_TGD, value_TGD)), strict=True)
        return torch.cat([_attend(*part, self.softmax_scale, gqa) for part in parts])


def _attend(query_SND: Tensor, key_SGD: Tensor, value_SGD: Tensor, scale: float | None, gqa: bool) -> Tensor:
    """Causal attention of one sequence, [S, heads, head_dim]."""
    query, key, value = (t.transpose(0, 1)[None] for t in (query_SND, key_SGD, value_SGD))
    context_1NSD = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    return context_1NSD[0].transpose(0, 1)
