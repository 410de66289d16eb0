"""RMSNorm for sequence parallelism, missing in megatron-core's local layer spec."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gradient is summed over the tensor-parallel ranks if each has only a slice of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        weight: Any = self.weight
        weight.sequence_parallel = config.sequence_parallel
