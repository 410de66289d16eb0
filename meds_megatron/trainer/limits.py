"""Limits beyond which a run ends: its results would not be what they seem."""

from meds_megatron.actor.train_batch import UpdateOutput
from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.run.directory import RunDirectory


def check_mismatch(step: int, metrics: dict[str, float], config: Config) -> None:
    """Raises UserError when trainer and engines disagree by more than `sync.max_logprob_difference`."""
    limit = config.sync.max_logprob_difference
    found = metrics.get("mismatch/logprob_abs_mean", 0.0)
    if limit is not None and not found <= limit:
        raise UserError(
            f"Step {step}: trainer and engine log-probs differ by {found:.4g} on average, more than "
            f"sync.max_logprob_difference = {limit}: the engines run other weights, or another precision"
        )


def check_updates(step: int, before: int, updates: list[UpdateOutput], config: Config, run: RunDirectory) -> int:
    """Consecutive skipped updates up to now, `before` of them before this step.

    Raises UserError after `faults.max_bad_updates` in a row; it names the checkpoint from which the run can continue.
    """
    in_a_row, limit = before, config.faults.max_bad_updates
    for update in updates:
        in_a_row = in_a_row + 1 if update.skipped else 0
        if in_a_row == limit:
            checkpoint = run.newest_checkpoint()
            go_on = f"and continue from {checkpoint.path}" if checkpoint else "and start again: there is no checkpoint"
            raise UserError(
                f"Step {step}: the loss or gradient of {limit} updates in a row was not finite "
                f"(faults.max_bad_updates): look for the cause in {run.rollouts_of(step)}, lower optimizer.lr, {go_on}"
            )
    return in_a_row
