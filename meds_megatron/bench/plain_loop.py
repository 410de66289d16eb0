"""The policy's part of a step as a plain loop writes it: a transformers model, right-padded batches, torch's AdamW."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from meds_megatron.actor.train_batch import TrainBatch
from meds_megatron.config import Config


class PlainLoop:
    """A Qwen model that is scored and trained `rows` responses at a time, in the order in which they come."""

    def __init__(self, directory: Path, config: Config, device: str, rows: int):
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, config.model.dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        self._model.to(device)  # type: ignore[arg-type]
        self._config, self._device, self._rows = config, device, rows
        optimizer = config.optimizer
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )

    @torch.no_grad()
    def forward(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """Log-probs [R] of all responses, and the logit of each answer's first token at every layer, [B, L]."""
        logprobs, fingerprints = [], []
        head_VH = self._model.get_output_embeddings().weight
        for rows in self._batches(batch):
            tokens_BS, mask_BS = self._padded(batch, rows)
            output = self._model(tokens_BS, attention_mask=mask_BS, output_hidden_states=True, use_cache=False)
            logprobs.append(self._response_logprobs(output.logits, tokens_BS, batch, rows))
            places = torch.from_numpy(batch.answer_positions_B[rows]).to(self._device)
            each = torch.arange(len(rows), device=self._device)
            targets_NH = head_VH[tokens_BS[each, places + 1]]
            layers = [
                (hidden_BSH[each, places] * targets_NH).sum(-1).float() for hidden_BSH in output.hidden_states[1:]
            ]
            fingerprints.append(torch.stack(layers, dim=-1))
        return torch.cat(logprobs).cpu(), torch.cat(fingerprints).cpu()

    def update(self, batch: TrainBatch) -> tuple[float, float]:
        """One step of AdamW on the clipped surrogate of all responses: the loss and the gradient's norm."""
        policy, offsets, total = self._config.policy, batch.drawn_offsets_B1, 0.0
        self._optimizer.zero_grad()
        for rows in self._batches(batch):
            tokens_BS, mask_BS = self._padded(batch, rows)
            logits_BSV = self._model(tokens_BS, attention_mask=mask_BS, use_cache=False).logits
            logprobs_R = self._response_logprobs(logits_BSV, tokens_BS, batch, rows)
            old_R = np.concatenate([batch.logprobs_R[offsets[row] : offsets[row + 1]] for row in rows])
            lengths = batch.drawn_lengths_B[rows]
            advantages_R = torch.from_numpy(np.repeat(batch.advantages_B[rows], lengths)).to(self._device)
            weights_R = torch.from_numpy(np.repeat(batch.loss_weights_B[rows], lengths)).to(self._device)
            ratio_R = (logprobs_R - torch.from_numpy(old_R).to(self._device)).clamp(-20, 20).exp()
            clipped_R = ratio_R.clamp(1 - policy.clip_low, 1 + policy.clip_high)
            loss = (torch.maximum(-advantages_R * ratio_R, -advantages_R * clipped_R) * weights_R).sum()
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.clip_grad)
        self._optimizer.step()
        return total, norm.item()

    def _batches(self, batch: TrainBatch) -> list[np.ndarray]:
        return [np.arange(start, min(start + self._rows, len(batch))) for start in range(0, len(batch), self._rows)]

    def _padded(self, batch: TrainBatch, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask [B, S], padded on the right to the longest sequence."""
        lengths = batch.lengths_B[rows]
        tokens_BS = np.zeros((len(rows), lengths.max()), dtype=np.int64)
        for place, row in enumerate(rows):
            tokens_BS[place, : lengths[place]] = batch.tokens_T[batch.offsets_B1[row] : batch.offsets_B1[row + 1]]
        mask_BS = np.arange(lengths.max()) < lengths[:, None]
        return torch.from_numpy(tokens_BS).to(self._device), torch.from_numpy(mask_BS).to(self._device)

    def _response_logprobs(self, logits_BSV: Tensor, tokens_BS: Tensor, batch: TrainBatch, rows: np.ndarray) -> Tensor:
        """Log-probs of the drawn tokens, one response after the other."""
        logprobs_BS = -F.cross_entropy(
            logits_BSV[:, :-1].float().flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="none"
        ).view(len(rows), -1)
        masks = [batch.loss_mask_T[batch.offsets_B1[row] + 1 : batch.offsets_B1[row + 1]] for row in rows]
        return torch.cat([of_row[np.flatnonzero(mask)] for of_row, mask in zip(logprobs_BS, masks, strict=True)])
