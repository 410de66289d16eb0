"""What a step reports: its metrics under their names."""

from collections import Counter

import numpy as np
import torch

from meds_megatron.actor.messages import UpdateResult
from meds_megatron.algorithm.corrections import logprob_mismatch
from meds_megatron.errors import UserError
from meds_megatron.trainer.batch import Batch
from meds_megatron.trainer.collect import Collected
from meds_megatron.trainer.groups import failed_gradings
from meds_megatron.trainer.memory_keys import TARGETS
from meds_megatron.trainer.parts import Parts
from meds_megatron.trainer.rollout_columns import rollout_columns
from meds_megatron.trainer.state import RunState


def report_step(
    parts: Parts,
    state: RunState,
    collected: Collected,
    batch: Batch,
    updates: list[list[UpdateResult]],
    metrics: dict[str, float],
) -> None:
    """Logs, shows and stores step `state.step`; `metrics` are what is known already (a validation).

    Raises UserError when trainer and engines disagree by more than `sync.max_logprob_difference`.
    """
    metrics = {**sampling_metrics(collected), **parts.engines.metrics(), **metrics}
    if len(batch.data):
        metrics |= reward_metrics(batch, parts.config.penalty.target)
        metrics |= mismatch_metrics(batch) | update_metrics(updates)
    with parts.timer("memory"):
        parts.memory.wait()
        metrics |= parts.memory.metrics()
    state.prompts_seen += len(collected.groups)
    state.tokens_seen += len(batch.data.rollout_logprobs_R)
    metrics |= parts.timer.take()
    generated = metrics["response/length_mean"] * metrics["response/count"]
    training_s = metrics["time/step"] - metrics.get("time/validation", 0.0) - metrics.get("time/export", 0.0)
    metrics["throughput/tokens_per_second"] = generated / training_s
    metrics["throughput/rollout_tokens_per_second"] = generated / metrics["time/rollout"]
    metrics |= {"progress/prompts": state.prompts_seen, "progress/tokens": state.tokens_seen}
    if collected.shortfall:
        parts.console.note(f"step {state.step}: {collected.shortfall}: the step goes on with those")
    if failed := failed_gradings(collected.groups):
        parts.console.note(f"step {state.step}: grading failed for {failed} responses, not remembered")
    parts.report(state.step, metrics)
    if parts.config.train.save_rollouts:
        parts.run.save_rollouts(state.step, rollout_columns(collected.groups))
    _check_mismatch(parts, state, metrics)


def sampling_metrics(collected: Collected) -> dict[str, float]:
    """Of everything that was generated, also what the filter dropped."""
    samples = [sample for group in collected.groups for sample in group.samples]
    responses, grades = [sample.response for sample in samples], [sample.grade for sample in samples]
    outcomes = Counter(grade.outcome for grade in grades)
    lengths = np.array([len(response.token_ids) for response in responses])
    reasons = Counter(response.no_fingerprint_reason for response in responses if response.boxed_token < 0)
    return {
        "accuracy/mean": float(np.mean([grade.correct for grade in grades])),
        "accuracy/solved": float(np.mean([any(group.accuracy) for group in collected.groups])),
        "filter/kept_share": len(collected.kept) / len(collected.groups),
        "filter/batches": collected.batches,
        "response/count": len(responses),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_share": float(np.mean([r.finish_reason == "length" for r in responses])),
        **{f"grading/{outcome}": outcomes[outcome] for outcome in ("no_answer", "timeout", "error")},
        **{f"fingerprint/missing_{reason}": count for reason, count in sorted(reasons.items())},
    }


def reward_metrics(batch: Batch, target: str) -> dict[str, float]:
    """Of the responses that are trained on; the mean penalty is of those that `penalty.target` names."""
    targeted_B = np.isin(batch.correct_B, TARGETS[target])
    return {
        "accuracy/kept_mean": float(batch.correct_B.mean()),
        "reward/mean": float(batch.scores_B.mean()),
        "reward/shaped_mean": float(batch.shaped_scores_B.mean()),
        "reward/penalty_mean": float(batch.penalties_B[targeted_B].mean()) if targeted_B.any() else 0.0,
    }


def mismatch_metrics(batch: Batch) -> dict[str, float]:
    """How far the trainer's log-probs of the rollout are from the engine's."""
    trainer_R, rollout_R = (torch.from_numpy(v) for v in (batch.data.logprobs_R, batch.data.rollout_logprobs_R))
    return {f"mismatch/{name}": value for name, value in logprob_mismatch(trainer_R, rollout_R).items()} | {
        "policy/entropy": float(batch.data.entropy_R.mean())
    }


def update_metrics(updates: list[list[UpdateResult]]) -> dict[str, float]:
    """Means over the step's optimizer steps, each a mean over all tokens of its mini-batch."""
    steps = [_whole_update(parts) for parts in zip(*updates, strict=True)]
    metrics = {f"policy/{name}": float(np.mean([step[name] for step in steps])) for name in steps[0]}
    # Exactly 0 when the update's forward pass repeats the one that gave the old log-probs.
    metrics["policy/kl_first_update"] = steps[0]["kl"]
    metrics["policy/updates"] = len(steps)
    return metrics


def _whole_update(parts: tuple[UpdateResult, ...]) -> dict[str, float]:
    """One optimizer step from its data-parallel parts: the loss, and the mean over its tokens of every other sum."""
    totals = {name: sum(part.sums[name] for part in parts) for name in parts[0].sums}
    loss, tokens = totals.pop("loss"), max(totals.pop("tokens"), 1.0)
    return {
        "loss": loss,
        **{name: total / tokens for name, total in totals.items()},
        "grad_norm": parts[0].grad_norm,
        "learning_rate": parts[0].learning_rate,
    }


def _check_mismatch(parts: Parts, state: RunState, metrics: dict[str, float]) -> None:
    limit = parts.config.sync.max_logprob_difference
    found = metrics.get("mismatch/logprob_abs_mean", 0.0)
    if limit is not None and found > limit:
        raise UserError(
            f"Step {state.step}: trainer and engine log-probs differ by {found:.4g} on average, more than "
            f"sync.max_logprob_difference = {limit}: the engines run other weights, or another precision"
        )
