"""One pass of micro-batches through the pipeline: forward only, or forward and backward."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from meds_megatron.actor.logprobs import logprobs_and_entropy
from meds_megatron.actor.microbatch import MicroBatch, build_micro_batch
from meds_megatron.actor.train_batch import TrainBatch
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
        output = model(micro_batch.tokens_BS, micro_batch.positions_BS, attention_mask=None)
        return output, partial(finish, micro_batch, model)

    def finish(micro_batch, model, hidden_SBH):
        hidden_RH = hidden_SBH.flatten(0, 1).index_select(0, micro_batch.predictors_R)
        logprobs_R, entropy_R = logprobs_and_entropy(
            hidden_RH,
            unwrapped(model).head_weight(),
            micro_batch.targets_R,
            temperature=temperature,
            vocab_size=vocab_size,
        )
        loss, kept = on_last_stage(micro_batch, logprobs_R, entropy_R)
        return loss, torch.tensor(1, dtype=torch.int), kept

    pad_to = config.tensor_model_parallel_size if config.sequence_parallel else 1
    # Generators: a micro-batch is padded only when it is used.
    streams = [(build_micro_batch(batch, rows, pad_to, device) for rows in micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=streams if len(chunks) > 1 else streams[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        # With variable_seq_lengths stages exchange the real shapes; these two are required but not used.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )
