"""One rank's share of the policy: the forward pass of a step, and its updates."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from meds_megatron.actor import microbatch, optimizer, passes
from meds_megatron.actor.fingerprint import FingerprintCollector
from meds_megatron.actor.messages import ForwardResult, UpdateResult
from meds_megatron.actor.process_group import speaks_for_model_replica
from meds_megatron.actor.step_data import StepData, scatter_ragged, take_ragged
from meds_megatron.algorithm.advantages import shape_token_advantages
from meds_megatron.algorithm.aggregation import aggregation_weights
from meds_megatron.algorithm.losses import LossInputs, policy_loss
from meds_megatron.config import Config
from meds_megatron.config.model_shape import ModelShape
from meds_megatron.model.gpt import build_chunks, transformer_config
from meds_megatron.weights.load import load_hf


class Policy:
    """The model chunks of one rank. All ranks of a model replica call every method together, with the same data."""

    def __init__(self, config: Config, model_dir: str, device: str):
        self._config = config
        self.device = device
        self.shape = ModelShape.from_hf(model_dir)
        model_config = transformer_config(self.shape, config.model, config.parallel)
        self.chunks = build_chunks(
            self.shape, model_config, config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        )
        load_hf(self.chunks, self.shape, model_dir)
        self._wrapped = optimizer.wrap(self.chunks)
        self._optimizer = optimizer.build(self._wrapped, model_config, config.optimizer)

    def forward(self, data: StepData) -> ForwardResult | None:
        """Log-probs, entropies and fingerprints of the rank's responses; None on ranks that do not speak for them."""
        fingerprints = FingerprintCollector(self.chunks, data, self._config.memory.norm, self.device)
        plan = [rows for minibatch in self._plan(data) for rows in minibatch]
        for chunk in self._wrapped:
            chunk.eval()
        with torch.no_grad(), fingerprints.hooked():
            kept = self._run(data, plan, _keep_logprobs, forward_only=True, before_chunk=fingerprints.begin)
        for chunk in self._wrapped:
            chunk.train()
        fingerprints_BL = fingerprints.gather(len(data))
        if not speaks_for_model_replica():
            return None
        rows, lengths_B = plan, data.response_lengths_B
        return ForwardResult(
            logprobs_R=scatter_ragged([k["logprobs"] for k in kept], rows, lengths_B),
            entropy_R=scatter_ragged([k["entropy"] for k in kept], rows, lengths_B),
            fingerprints_BL=fingerprints_BL,
        )

    def update(self, data: StepData, step: int) -> list[UpdateResult]:
        """Makes the optimizer steps of training step `step`, one a mini-batch; off the last stage sums are empty."""
        rate = optimizer.learning_rate(step, self._config.optimizer)
        optimizer.set_learning_rate(self._optimizer, rate)
        loss = _MicroBatchLoss(data, self._config, self.device)
        results = []
        for plan in self._plan(data):
            for chunk in self._wrapped:
                chunk.zero_grad_buffer()
            self._optimizer.zero_grad()
            kept = self._run(data, plan, loss, forward_only=False)
            _, grad_norm, _ = self._optimizer.step()
            results.append(UpdateResult(_add_up(kept), float(grad_norm), rate))
        return results

    def _plan(self, data: StepData) -> list[list[np.ndarray]]:
        return microbatch.cut(
            data.lengths_B,
            data.minibatches_B,
            len(data.minibatch_tokens_M),
            self._config.train.micro_batch_responses,
            passes.micro_batch_multiple(),
        )

    def _run(self, data, plan, on_last_stage, **settings) -> list[dict]:
        return passes.run(
            self._wrapped,
            data,
            plan,
            on_last_stage,
            temperature=self._config.rollout.temperature,
            vocab_size=self.shape.vocab_size,
            device=self.device,
            **settings,
        )


class _MicroBatchLoss:
    """The policy loss of a micro-batch, as its share of the whole mini-batch's."""

    def __init__(self, data: StepData, config: Config, device: str):
        self._offsets_B1 = data.response_offsets_B1
        self._config = config
        self._device = device
        lengths_B = self._lengths_B = torch.tensor(data.response_lengths_B)
        weights_B = torch.zeros(len(data), dtype=torch.float32)
        for minibatch, (tokens, responses) in enumerate(
            zip(data.minibatch_tokens_M, data.minibatch_responses_M, strict=True)
        ):
            rows = torch.from_numpy(np.flatnonzero(data.minibatches_B == minibatch))
            weights_B[rows] = aggregation_weights(
                lengths_B[rows],
                config.policy.aggregation,
                total_tokens=int(tokens),
                total_responses=int(responses),
                max_response_tokens=config.rollout.max_response_tokens,
            )
        self._values_R = {
            "old_logprobs_T": data.logprobs_R,
            "rollout_logprobs_T": data.rollout_logprobs_R,
            "entropy_T": data.entropy_R,
            "advantages_T": np.repeat(data.advantages_B, data.response_lengths_B).astype(np.float32),
            "weights_T": weights_B.repeat_interleave(lengths_B).numpy(),
        }

    def __call__(self, micro_batch, logprobs_R: Tensor, _entropy_R: Tensor) -> tuple[Tensor, dict]:
        rows = micro_batch.rows
        values = {
            name: torch.from_numpy(take_ragged(values_R, self._offsets_B1, rows)).to(self._device)
            for name, values_R in self._values_R.items()
        }
        inputs = LossInputs(logprobs_T=logprobs_R, lengths_B=self._lengths_B[rows].to(self._device), **values)
        shaped = shape_token_advantages(inputs, self._config.advantage)
        output = policy_loss(replace(inputs, advantages_T=shaped.advantages_T), self._config.policy)
        sums = {"loss": output.loss.detach(), **shaped.token_sums, **output.token_sums}
        return output.loss, {name: float(value) for name, value in sums.items()}


def _keep_logprobs(_micro_batch, logprobs_R: Tensor, entropy_R: Tensor) -> tuple[Tensor, dict]:
    return logprobs_R.sum(), {"logprobs": logprobs_R.cpu().numpy(), "entropy": entropy_R.cpu().numpy()}


def _add_up(kept: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(sums[name] for sums in kept) for name in (kept[0] if kept else {})}
