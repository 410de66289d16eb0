"""Policy losses, one a file. A new one is a file here, a line in LOSSES and its name in `PolicyConfig.loss`; or a file
of the user's own, which the config names."""

from collections.abc import Callable

from meds_megatron.algorithm.losses.base import LossInputs, LossOutput
from meds_megatron.algorithm.losses.cispo import cispo_loss
from meds_megatron.algorithm.losses.gspo import gspo_loss
from meds_megatron.algorithm.losses.ppo import ppo_loss
from meds_megatron.config import PolicyConfig
from meds_megatron.errors import UserError
from meds_megatron.user_functions import is_function, load_function

LOSSES: dict[str, Callable[[LossInputs, PolicyConfig], LossOutput]] = {
    "ppo": ppo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
}


def policy_loss(inputs: LossInputs, config: PolicyConfig) -> LossOutput:
    """The loss that `policy.loss` names: a micro-batch's share of the mini-batch's loss, and its metrics."""
    if not is_function(config.loss):
        return LOSSES[config.loss](inputs, config)
    output = load_function("policy.loss", config.loss)(inputs, config)
    if not isinstance(output, LossOutput) or "tokens" not in output.token_sums:
        raise UserError(
            f"policy.loss is {config.loss}, which gave {type(output).__name__}, expected a LossOutput whose token_sums "
            "have `tokens` (algorithm.losses)"
        )
    return output


__all__ = ["LOSSES", "LossInputs", "LossOutput", "policy_loss"]
