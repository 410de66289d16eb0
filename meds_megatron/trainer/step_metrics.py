"""Metrics of a step."""

from collections import Counter

import numpy as np
import torch

from meds_megatron.actor.train_batch import TrainBatch, UpdateOutput
from meds_megatron.algorithm.corrections import logprob_mismatch
from meds_megatron.trainer.error_memory import TARGETS
from meds_megatron.trainer.rollout_batch import RolloutBatch
from meds_megatron.trainer.training_batch import StepBatch


def sampling_metrics(rollouts: RolloutBatch) -> dict[str, float]:
    """Metrics of everything that was generated, the groups that the filter dropped included.

    `accuracy/mean` and `accuracy/solved`, the share of prompts with at least one right response, leave out responses
    whose grading failed (`grading/timeout`, `grading/error`), and are missing where all did.
    """
    samples = rollouts.samples
    completions, grades = [sample.completion for sample in samples], [sample.grade for sample in samples]
    outcomes = Counter(grade.outcome for grade in grades)
    lengths = np.array([len(completion.token_ids_S) for completion in completions])
    reasons = Counter(completion.no_answer_reason for completion in completions if completion.answer_position < 0)
    accuracies = [group.accuracy for group in rollouts.groups if group.accuracy]
    metrics = {}
    if accuracies:
        metrics["accuracy/mean"] = float(np.mean(np.concatenate(accuracies)))
        metrics["accuracy/solved"] = float(np.mean([any(accuracy) for accuracy in accuracies]))
    return metrics | {
        "filter/kept_share": len(rollouts.kept_groups) / len(rollouts.groups),
        "filter/batches": rollouts.generation_batches,
        "response/count": len(samples),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        **{f"grading/{outcome}": outcomes[outcome] for outcome in ("no_answer", "timeout", "error")},
        **{f"fingerprint/missing_{reason}": count for reason, count in sorted(reasons.items())},
    }


def staleness_metrics(rollouts: RolloutBatch, batch: StepBatch) -> dict[str, float]:
    """Age of the tokens that the step trains on, mean and highest; the share of responses during which the weights
    changed; and how far the policy has moved away from the weights that drew the tokens, fresh ones included: the mean
    distance of log-probs in nats."""
    if not len(batch):
        return {}
    samples = zip(rollouts.samples, rollouts.trained_B, strict=True)
    mixed = [len(sample.completion.version_changes) > 1 for sample, trained in samples if trained]
    return {
        "staleness/mean": float(batch.ages_R.mean()),
        "staleness/max": int(batch.ages_R.max()),
        "staleness/mixed_share": float(np.mean(mixed)),
        "staleness/logprob_abs_mean": _mismatch(batch.responses, batch.ages_R >= 0)["logprob_abs_mean"],
    }


def training_metrics(batch: StepBatch, updates: list[UpdateOutput], target: str) -> dict[str, float]:
    """Metrics of the responses that are trained on; the mean penalty is of those that `penalty.target` names, the
    mismatch of the tokens that the policy's own weights drew."""
    if not len(batch):
        return {}
    responses = batch.responses
    targeted_B = np.isin(responses.correct_B, TARGETS[target])
    mismatch = _mismatch(responses, batch.ages_R == 0)
    return {
        "accuracy/kept_mean": float(responses.correct_B.mean()),
        "reward/mean": float(responses.scores_B.mean()),
        "reward/shaped_mean": float(responses.shaped_scores_B.mean()),
        "reward/penalty_mean": float(responses.penalties_B[targeted_B].mean()) if targeted_B.any() else 0.0,
        "policy/entropy": float(responses.entropy_R.mean()),
        **{f"mismatch/{name}": value for name, value in mismatch.items()},
        **update_metrics(updates),
    }


def _mismatch(batch: TrainBatch, chosen_R: np.ndarray) -> dict[str, float]:
    """`logprob_mismatch` of the chosen tokens; nothing where there are none."""
    if not chosen_R.any():
        return {}
    logprobs_R, rollout_logprobs_R = batch.logprobs_R[chosen_R], batch.rollout_logprobs_R[chosen_R]
    return logprob_mismatch(torch.from_numpy(logprobs_R), torch.from_numpy(rollout_logprobs_R))


def update_metrics(updates: list[UpdateOutput]) -> dict[str, float]:
    """Means over the step's optimizer steps, of per-token sums each a mean over all tokens of its mini-batch.

    Those that were skipped, whose values may be NaN, are counted and left out; without others there are no means.
    """
    metrics: dict[str, float] = {"policy/updates": sum(not update.skipped for update in updates)}
    metrics["policy/skipped_updates"] = len(updates) - metrics["policy/updates"]
    steps = [_update_means(update) for update in updates if not update.skipped]
    if steps:
        metrics |= {f"policy/{name}": float(np.mean([step[name] for step in steps])) for name in steps[0]}
    if not updates[0].skipped and "kl" in steps[0]:
        # Exactly 0 when the update's forward pass repeats the one that gave the old log-probs.
        metrics["policy/kl_first_update"] = steps[0]["kl"]
    return metrics


def _update_means(update: UpdateOutput) -> dict[str, float]:
    tokens = max(update.token_sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in update.token_sums.items() if name != "tokens"}
    if "importance_square" in means:
        # Kish's effective sample size, as a share of the tokens.
        square = means.pop("importance_square")
        means["importance_effective_share"] = means["importance_weight"] ** 2 / square if square else 0.0
    return means | {"loss": update.loss, "grad_norm": update.grad_norm, "learning_rate": update.learning_rate}


def throughput_metrics(metrics: dict[str, float], generated: int, overlaps: bool) -> dict[str, float]:
    """`generated` tokens a second, of the step without validation and export, and of generation alone, unless it
    `overlaps` with training: `time/rollout` is then what the trainer waits."""
    training_s = metrics["time/step"] - metrics.get("time/validation", 0.0) - metrics.get("time/export", 0.0)
    rates = {"throughput/tokens_per_second": generated / training_s}
    if not overlaps:
        rates["throughput/rollout_tokens_per_second"] = generated / metrics["time/rollout"]
    return rates
