"""Policy losses, one a file. A new one is a file here, a line in LOSSES and its name in `PolicyConfig.loss`."""

from collections.abc import Callable

from meds_megatron.algorithm.losses.base import LossInputs, LossOutput
from meds_megatron.algorithm.losses.cispo import cispo_loss
from meds_megatron.algorithm.losses.gspo import gspo_loss
from meds_megatron.algorithm.losses.ppo import ppo_loss
from meds_megatron.config import PolicyConfig

LOSSES: dict[str, Callable[[LossInputs, PolicyConfig], LossOutput]] = {
    "ppo": ppo_loss,
    "gspo": gspo_loss,
    "cispo": cispo_loss,
}


def policy_loss(inputs: LossInputs, config: PolicyConfig) -> LossOutput:
    """The loss that `policy.loss` names: a micro-batch's share of the mini-batch's loss, and its metrics."""
    return LOSSES[config.loss](inputs, config)


__all__ = ["LOSSES", "LossInputs", "LossOutput", "policy_loss"]
