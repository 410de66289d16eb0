"""One rank's share of the policy: the forward pass of a step, and its optimizer steps."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from meds_megatron.actor import optimizer, optimizer_state
from meds_megatron.actor.fingerprint import FingerprintCollector
from meds_megatron.actor.microbatch import MicroBatch
from meds_megatron.actor.offload import Offload
from meds_megatron.actor.pipeline import run_pipeline
from meds_megatron.actor.process_group import is_replica_output_rank
from meds_megatron.actor.train_batch import ForwardOutput, TrainBatch, UpdateOutput, scatter_ragged, take_ragged
from meds_megatron.algorithm.advantages import shape_token_advantages
from meds_megatron.algorithm.losses import LossInputs, policy_loss
from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.model.gpt import build_chunks, transformer_config
from meds_megatron.weights.load import load_hf


class Policy:
    """The model chunks of one rank. All ranks of a model replica call every method together, with the same data: the
    rank's TrainBatch and the rows of its micro-batches (`actor.schedule`)."""

    def __init__(self, config: Config, model_dir: str, device: str):
        self._config = config
        self.device = device
        self.micro_batches_begun = 0
        self.shape = ModelShape.from_hf(model_dir)
        model_config = transformer_config(self.shape, config.model, config.parallel)
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        self.chunks = build_chunks(self.shape, model_config, longest)
        load_hf(self.chunks, self.shape, model_dir)
        self._wrapped = optimizer.wrap(self.chunks)
        self.optimizer = optimizer.build(self._wrapped, model_config, config.optimizer)
        optimizer_state.make_state(self.optimizer)
        self.offload = Offload(self._wrapped, self.optimizer, bool(config.train.offload_optimizer))

    def forward(self, batch: TrainBatch, micro_batches: list[np.ndarray]) -> ForwardOutput | None:
        """Log-probs, entropies and fingerprints of all responses; None except on the replica's output rank."""
        fingerprints = FingerprintCollector(self.chunks, batch, self._config.memory.norm, self.device)
        for chunk in self._wrapped:
            chunk.eval()
        with torch.no_grad(), fingerprints.hooked():
            kept = self._run(batch, micro_batches, _keep_logprobs, forward_only=True, before_chunk=fingerprints.begin)
        for chunk in self._wrapped:
            chunk.train()
        fingerprints_BL = fingerprints.gather(len(batch))
        if not is_replica_output_rank():
            return None

        def in_order(name: str) -> np.ndarray:
            values_R = torch.cat([part[name] for part in kept]).cpu().numpy()
            return scatter_ragged([values_R], [np.concatenate(micro_batches)], batch.drawn_lengths_B)

        return ForwardOutput(in_order("logprobs"), in_order("entropy"), fingerprints_BL)

    def update(self, batch: TrainBatch, minibatches: list[list[np.ndarray]], step: int) -> list[UpdateOutput]:
        """One optimizer step for each mini-batch of training step `step`; off the last stage there are no sums.

        A step whose loss or gradient is not finite is skipped (`UpdateOutput.skipped`), on all ranks.
        """
        rate = optimizer.learning_rate(step, self._config.optimizer)
        optimizer.set_learning_rate(self.optimizer, rate)
        loss = _MicroBatchLoss(batch, self._config, self.device)
        updates = []
        for micro_batches in minibatches:
            for chunk in self._wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            kept = self._run(batch, micro_batches, loss, forward_only=False)
            sums = _add_up(kept)
            loss_share = sums.pop("loss", 0.0)
            grad_norm, made = optimizer.step(self.optimizer, loss_share)
            updates.append(UpdateOutput(loss_share, sums, grad_norm, rate, skipped=not made))
        return updates

    def _run(self, batch, micro_batches, on_last_stage, before_chunk=None, **settings) -> list[dict]:
        def begin(micro_batch: MicroBatch) -> None:
            self.micro_batches_begun += 1
            if before_chunk is not None:
                before_chunk(micro_batch)

        return run_pipeline(
            self._wrapped,
            batch,
            micro_batches,
            on_last_stage,
            temperature=self._config.rollout.temperature,
            vocab_size=self.shape.vocab_size,
            device=self.device,
            before_chunk=begin,
            **settings,
        )


class _MicroBatchLoss:
    """The policy loss of a micro-batch, as its share of the mini-batch's loss."""

    def __init__(self, batch: TrainBatch, config: Config, device: str):
        self._batch, self._config, self._device = batch, config, device
        self._lengths_B, self._offsets_B1 = batch.drawn_lengths_B, batch.drawn_offsets_B1

    def __call__(self, micro_batch: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict]:
        batch, rows = self._batch, micro_batch.rows
        lengths = self._lengths_B[rows]
        inputs = LossInputs(
            logprobs_T=logprobs_R,
            old_logprobs_T=self._of(micro_batch, batch.logprobs_R),
            rollout_logprobs_T=self._of(micro_batch, batch.rollout_logprobs_R),
            entropy_T=entropy_R,
            advantages_T=self._to_device(np.repeat(batch.advantages_B[rows], lengths).astype(np.float32)),
            weights_T=self._to_device(np.repeat(batch.loss_weights_B[rows], lengths)),
            lengths_B=self._to_device(lengths),
        )
        shaped = shape_token_advantages(inputs, self._config.advantage)
        output = policy_loss(replace(inputs, advantages_T=shaped.advantages_T), self._config.policy)
        return output.loss, {"loss": output.loss.detach()} | output.token_sums | shaped.token_sums

    def _of(self, micro_batch: MicroBatch, values_R: np.ndarray) -> Tensor:
        return self._to_device(take_ragged(values_R, self._offsets_B1, micro_batch.rows))

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def _keep_logprobs(_micro_batch: MicroBatch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict]:
    return logprobs_R.sum(), {"logprobs": logprobs_R, "entropy": entropy_R}


def _add_up(kept: list[dict[str, Tensor]]) -> dict[str, float]:
    """Sums by name over the micro-batches of a pass, which leave the device together; none off the last stage."""
    if not kept:
        return {}
    values_MK = torch.stack([torch.stack(list(part.values())) for part in kept])
    return dict(zip(kept[0], values_MK.double().sum(0).tolist(), strict=True))
