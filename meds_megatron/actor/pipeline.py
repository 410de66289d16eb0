"""One pass of micro-batches through the pipeline: forward only, or forward and backward."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

from meds_megatron.actor.logprobs import logprobs_and_entropy
from meds_megatron.actor.microbatch import MicroBatch, build_micro_batch, sequence_tokens
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
        hidden_QH = hidden_T1H.squeeze(1).index_select(0, micro_batch.predictors_Q)
        values = logprobs_and_entropy(
            hidden_QH,
            unwrapped(model).head_weight(),
            micro_batch.targets_Q,
            temperature=temperature,
            vocab_size=vocab_size,
        )
        logprobs_R, entropy_R = (_of_all_ranks(values_Q, micro_batch) for values_Q in values)
        loss, kept = on_last_stage(micro_batch, logprobs_R, entropy_R)
        return loss, torch.tensor(1, dtype=torch.int), kept

    layout = ParallelLayout(
        tensor=config.tensor_model_parallel_size,
        context=config.context_parallel_size,
        pipeline=config.pipeline_model_parallel_size,
    )
    spans = [sequence_tokens(batch, rows, layout) for rows in micro_batches]
    tokens = [layout.padded_tokens(int(spans_B.sum())) for spans_B in spans]
    if layout.pipeline > 1:
        # Its stages know the shape of what they receive.
        tokens = [max(tokens)] * len(tokens)
    context = parallel_state.get_context_parallel_rank(), layout.context
    # Generators: a micro-batch is packed only when it is used.
    streams = [
        (build_micro_batch(batch, *part, device, context) for part in zip(micro_batches, spans, tokens, strict=True))
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


def _of_all_ranks(values_Q: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The values of all drawn tokens, in order, from those of this context-parallel rank.

    Every rank computes the same loss from them; its gradient is that of this rank's values.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return values_Q
    zeros_R = values_Q.new_zeros(micro_batch.drawn_tokens)
    return reduce_from_tensor_model_parallel_region(zeros_R.index_copy(0, micro_batch.drawn_Q, values_Q), group)
