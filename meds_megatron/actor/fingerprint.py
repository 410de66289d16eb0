"""The fingerprint of an answer: for every layer, the logit that the LM head would give the answer's first token.

Each pipeline stage keeps, through hooks, one hidden state a response and layer, and multiplies it in float32 with the
one row of the head that belongs to the response's target token. The stages' parts are then put side by side.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from meds_megatron.actor.microbatch import MicroBatch
from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.model.gpt import PolicyModel, chunk_layers


class FingerprintCollector:
    """Gathers the fingerprints of one rank's responses while their forward pass runs.

    `norm` chooses the layers whose hidden states pass the final norm first: `last` as published (the Hugging Face
    convention), `all` (the usual logit lens) or `none`. Every rank of a model replica makes one and calls its methods
    together.
    """

    def __init__(self, chunks: list[PolicyModel], batch: TrainBatch, norm: str, device: str):
        """Gathers the head's rows of all target tokens."""
        self._chunks = chunks
        self._norm = norm
        self._num_layers = chunks[0].config.num_layers
        self._rows_B = np.flatnonzero(batch.answer_positions_B >= 0)
        self._place_of_row = {int(row): place for place, row in enumerate(self._rows_B)}
        self._values_NL = torch.zeros(len(self._rows_B), self._num_layers, dtype=torch.float32, device=device)
        self.sent_bytes = 0
        """Bytes sent by this rank to other pipeline stages."""
        self._head_NH = self._head_rows(_target_tokens(batch, self._rows_B))
        self._final_norm_H = self._final_norm_weight() if norm == "all" else None
        self._micro_batch: MicroBatch
        self._places_N: Tensor

    def begin(self, micro_batch: MicroBatch) -> None:
        """Sets the micro-batch of the next forward pass of a chunk."""
        self._micro_batch = micro_batch
        places = [self._place_of_row[int(row)] for row in micro_batch.answer_rows]
        self._places_N = torch.tensor(places, dtype=torch.int64, device=self._values_NL.device)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """While open, forward hooks on the layers record the fingerprints."""
        hooks = []
        for chunk in self._chunks:
            for number, layer in chunk_layers(chunk):
                is_last = number == self._num_layers - 1
                source = chunk.decoder.final_layernorm if is_last and self._norm != "none" else layer
                normed = self._norm == "all" and not is_last
                hooks.append(source.register_forward_hook(self._hook(number, normed)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: int, normed: bool):
        def keep(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> None:
            hidden_T1H = output[0] if isinstance(output, tuple) else output
            place_N, mine_N = self._owned(len(hidden_T1H))
            hidden_NH = hidden_T1H[place_N, 0].float()
            if normed:
                assert self._final_norm_H is not None
                hidden_NH = rms_norm(hidden_NH, self._final_norm_H, self._chunks[0].config.layernorm_epsilon)
            values_N = (hidden_NH * self._head_NH[self._places_N]).sum(-1)
            self._values_NL[self._places_N, layer] = values_N * mine_N

        return keep

    def _owned(self, local_length: int) -> tuple[Tensor, Tensor]:
        """Place of each answer in this rank's part of the micro-batch, and whether this rank owns it.

        Its token is on one context-parallel rank. With sequence parallelism a rank holds `local_length` consecutive
        tokens of these; otherwise every tensor-parallel rank holds them all and rank 0 is the owner.
        """
        place_N = self._micro_batch.answers_N
        rank = parallel_state.get_tensor_model_parallel_rank()
        if self._chunks[0].config.sequence_parallel:
            place_N = place_N - rank * local_length
            mine_N = (place_N >= 0) & (place_N < local_length)
        else:
            mine_N = (place_N >= 0) & (rank == 0)
        return torch.where(mine_N, place_N, 0), mine_N

    def gather(self, count: int) -> np.ndarray:
        """The fingerprints of all `count` responses, float32 [B, L], zero where there is none; the same on every rank.

        Each value has one owner and is zero elsewhere, so sums over the ranks are exact.
        """
        dist.all_reduce(self._values_NL, group=parallel_state.get_tensor_model_parallel_group())
        dist.all_reduce(self._values_NL, group=parallel_state.get_context_parallel_group())
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() > 1:
            dist.all_reduce(self._values_NL, group=stages)
            self.sent_bytes += self._values_NL.nbytes
        fingerprints_BL = np.zeros((count, self._num_layers), dtype=np.float32)
        fingerprints_BL[self._rows_B] = self._values_NL.cpu().numpy()
        return fingerprints_BL

    def _head_rows(self, targets_N: np.ndarray) -> Tensor:
        """The head's row of each target token, float32 [N, H]: looked up on the last stage, sent to all."""
        last_chunk, device = self._chunks[-1], self._values_NL.device
        rows_NH = torch.zeros(len(targets_N), last_chunk.config.hidden_size, dtype=torch.float32, device=device)
        if last_chunk.post_process:
            weight_VH = last_chunk.head_weight().detach()
            first_row = parallel_state.get_tensor_model_parallel_rank() * weight_VH.shape[0]
            local_N = torch.from_numpy(targets_N).to(device) - first_row
            mine_N = (local_N >= 0) & (local_N < weight_VH.shape[0])
            rows_NH[mine_N] = weight_VH[local_N[mine_N]].float()
            dist.all_reduce(rows_NH, group=parallel_state.get_tensor_model_parallel_group())
        self._broadcast_from_last_stage(rows_NH)
        return rows_NH

    def _final_norm_weight(self) -> Tensor:
        """The weight of the model's final RMSNorm in float32, [H], on every stage."""
        last_chunk = self._chunks[-1]
        weight_H = torch.zeros(last_chunk.config.hidden_size, dtype=torch.float32, device=self._values_NL.device)
        if last_chunk.post_process:
            weight_H.copy_(last_chunk.decoder.final_layernorm.weight.detach())
        self._broadcast_from_last_stage(weight_H)
        return weight_H

    def _broadcast_from_last_stage(self, values: Tensor) -> None:
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() == 1:
            return
        dist.broadcast(values, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=stages)
        if stages.rank() == stages.size() - 1:
            self.sent_bytes += values.nbytes * (stages.size() - 1)


def rms_norm(hidden_NH: Tensor, weight_H: Tensor, epsilon: float) -> Tensor:
    """RMSNorm of float32 states, as the model's last layer has it."""
    return hidden_NH * torch.rsqrt(hidden_NH.square().mean(-1, keepdim=True) + epsilon) * weight_H


def _target_tokens(batch: TrainBatch, rows_N: np.ndarray) -> np.ndarray:
    """The token after the answer's position: the answer's first token."""
    return batch.tokens_T[batch.offsets_B1[rows_N] + batch.answer_positions_B[rows_N] + 1]
