"""Modules missing in megatron-core's local layer spec: an RMSNorm for sequence parallelism, and attention with torch's
fused kernels."""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks if each has only a slice of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class CausalAttention(nn.Module):
    """Causal grouped-query attention by `torch.nn.functional.scaled_dot_product_attention`.

    Replaces megatron-core's `core_attention`: query, key and value are [S, B, heads, head_dim] of this rank's heads,
    the result is [S, B, heads * head_dim]. Sequences are padded on the right, so the causal mask alone excludes padding
    from the context of real tokens.
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
            raise NotImplementedError("CausalAttention holds whole sequences: context_parallel_size must be 1")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query_SBND, key_SBGD, value_SBGD))
        context_BNSD = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)
