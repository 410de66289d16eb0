"""Qwen2.5 and Qwen3 as megatron-core GPTModels: the model chunks of this rank."""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from meds_megatron.config import ModelConfig, ParallelConfig, ParallelLayout
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.model.attention import PackedAttention, use_transformer_engine
from meds_megatron.model.layers import RMSNorm
from meds_megatron.weights.chunks import local_parameters, local_table
from meds_megatron.weights.table import padded_vocab

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns the final-norm hidden states instead of logits.

    `actor.logprobs` computes log-probs from them for response tokens only and block by block, so that the logits of a
    whole micro-batch are never in memory. With sequence parallelism the last stage gathers the sequence first.
    """

    def _postprocess(self, hidden_states: Tensor, *_args, **_kwargs) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_states)
        return copy_to_tensor_model_parallel_region(hidden_states)

    def head_weight(self) -> Tensor:
        """This rank's rows [V / TP, H] of the LM head; those of the embedding if the two are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """megatron-core's config of the model and its layout."""
    dtype = DTYPES[model.dtype]
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn_size,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_layout=pipeline_layout(ParallelLayout.of(parallel), shape.num_layers),
        # With the interleaved schedule two stages send to each other: only unbatched sends and receives keep the order.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Losses are already divided by the mini-batch's global token count: gradients are summed, not averaged.
        calculate_per_token_loss=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=use_transformer_engine(),
        recompute_granularity=None if model.recompute == "none" else model.recompute,
        recompute_method="uniform" if model.recompute == "full" else None,
        recompute_num_layers=1 if model.recompute == "full" else None,
    )


def pipeline_layout(layout: ParallelLayout, num_layers: int) -> list[list[str]] | None:
    """The modules of each model chunk in the order of the model, as megatron-core's `pipeline_model_parallel_layout`;
    None without a pipeline."""
    if layout.pipeline == 1:
        return None
    chunks = [["decoder"] * size for sizes in layout.chunk_sizes(num_layers) for size in sizes]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def layer_specs(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The modules of `num_layers` layers: Transformer Engine's if it is used, torch's otherwise."""
    if use_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if config.params_dtype is torch.float32:
            layer.submodules.self_attention.submodules.core_attention = PackedAttention
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = _local_layer(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return layer


def build_chunks(shape: ModelShape, config: TransformerConfig, max_sequence_length: int) -> list[PolicyModel]:
    """This rank's model chunks (`virtual_pipeline` of them) with uninitialised weights, which `weights.load` fills.

    `megatron.core.parallel_state` must be initialised.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in range(virtual or 1):
        stage = vp_stage if virtual else None
        chunk = PolicyModel(
            config=config,
            transformer_layer_spec=layer_specs(config, get_num_layers_to_build(config, vp_stage=stage)),
            vocab_size=padded_vocab(shape.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=shape.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            vp_stage=stage,
        )
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(chunk)
    _mark_tensor_parallel(chunks, shape, config.tensor_model_parallel_size)
    return chunks


def _mark_tensor_parallel(chunks: list[PolicyModel], shape: ModelShape, tp_size: int) -> None:
    """Set the tensor-parallel attributes of every sharded parameter.

    megatron-core sets them only when it initialises values. Without them the gradient norm would treat the shards as
    replicas and count only one rank's.
    """
    for entry, parameter in local_parameters(chunks, local_table(shape, tp_size), tp_size):
        if entry.split is not None and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=entry.split, stride=1)


def chunk_layers(chunk: PolicyModel) -> list[tuple[int, nn.Module]]:
    """The chunk's transformer layers with their index in the whole model, counted from 0."""
    return [(layer.layer_number - 1, layer) for layer in chunk.decoder.layers]
