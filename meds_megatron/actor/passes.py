"""One pass of micro-batches through the pipeline: forward only, or forward and backward."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from meds_megatron.actor import microbatch
from meds_megatron.actor.logprobs import logprobs_and_entropy
from meds_megatron.actor.microbatch import MicroBatch
from meds_megatron.actor.step_data import StepData
from meds_megatron.weights.chunks import unwrapped

OnLastStage = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, dict]]
"""Takes a micro-batch and its tokens' log-probs and entropy; gives the loss (already normalised) and what to keep."""


def run(
    chunks: list[nn.Module],
    data: StepData,
    plan: list[np.ndarray],
    on_last_stage: OnLastStage,
    *,
    temperature: float,
    vocab_size: int,
    device: str,
    forward_only: bool,
    before_chunk: Callable[[MicroBatch], None] | None = None,
) -> list[dict]:
    """Sends the micro-batches of `plan` through megatron-core's schedule for this layout.

    Returns what `on_last_stage` kept, one dict a micro-batch in the order of `plan`; empty lists on other stages.
    """
    config = unwrapped(chunks[0]).config

    def forward_step(batches, model):
        micro_batch = next(batches)
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
    batches = [microbatch.stream(data, plan, pad_to, device) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(chunks) > 1 else batches[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(plan),
        # Stages tell each other the real shapes (variable_seq_lengths): these two only have to be there.
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def micro_batch_multiple() -> int:
    """What the number of micro-batches must be a multiple of: the stages of an interleaved pipeline, else 1."""
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is None:
        return 1
    return parallel_state.get_pipeline_model_parallel_world_size()
