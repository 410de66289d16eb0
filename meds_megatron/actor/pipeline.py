"""One pass of micro-batches through the pipeline: forward only, or forward and backward."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from meds_megatron.actor.logprobs import logprobs_and_entropy
from meds_megatron.actor.microbatch import MicroBatch, build_micro_batch, packed_tokens
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import ParallelLayout
from meds_megatron.weights.chunks import unwrapped

OnLastStage = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, dict]]
"""Micro-batch, log-probs [R] and entropies [R] -> loss (already normalised) and results to keep."""


def run_pipeline(
    chunks: list[nn.Module],
    batch: TrainBatch,
    micro_batches: list[np.ndarray],
    on_last_stage: OnLastStage,
    *,
    temperature: float,
    vocab_size: int,
    device: str,
    forward_only: bool,
    before_chunk: Callable[[MicroBatch], None] | None = None,
) -> list[dict]:
    """Results of `on_last_stage`, one dict a micro-batch in the order of `micro_batches`; empty on other stages.

    `micro_batches` are rows of `batch`, which go through megatron-core's schedule for this layout.
    """
    config = unwrapped(chunks[0]).config

    def forward_step(stream, model):
        micro_batch = next(stream)
        if before_chunk is not None:
            before_chunk(micro_batch)
        output = model(
            micro_batch.tokens_1T,
            micro_batch.positions_1T,
            attention_mask=None,
            packed_seq_params=micro_batch.sequences,
        )
        return output, partial(finish, micro_batch, model)

    def finish(micro_batch, model, hidden_T1H):
        hidden_RH = hidden_T1H.squeeze(1).index_select(0, micro_batch.predictors_R)
        logprobs_R, entropy_R = logprobs_and_entropy(
            hidden_RH,
            unwrapped(model).head_weight(),
            micro_batch.targets_R,
            temperature=temperature,
            vocab_size=vocab_size,
        )
        loss, kept = on_last_stage(micro_batch, logprobs_R, entropy_R)
        return loss, torch.tensor(1, dtype=torch.int), kept

    tokens = _tokens(batch, micro_batches, config)
    # Generators: a micro-batch is packed only when it is used.
    streams = [
        (build_micro_batch(batch, rows, size, device) for rows, size in zip(micro_batches, tokens, strict=True))
        for _ in chunks
    ]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=streams if len(chunks) > 1 else streams[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        # Shape of what stages send each other, before it is divided over the ranks of a stage.
        seq_length=max(tokens),
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _tokens(batch: TrainBatch, micro_batches: list[np.ndarray], config: TransformerConfig) -> list[int]:
    """Tokens of each micro-batch, padded; in a pipeline all have those of the largest, so that its stages know the
    shape of what they receive."""
    layout = ParallelLayout(tensor=config.tensor_model_parallel_size, pipeline=config.pipeline_model_parallel_size)
    tokens = [layout.padded_tokens(packed_tokens(batch, rows)) for rows in micro_batches]
    return tokens if layout.pipeline == 1 else [max(tokens)] * len(tokens)
