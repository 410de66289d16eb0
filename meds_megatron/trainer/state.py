"""Everything that a restart needs besides weights, optimizer and error memory."""

from dataclasses import dataclass, field
from typing import Any

from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import UserError


@dataclass
class TrainerState:
    """Position of a run; the parts of the training loop change it."""

    sampler: PromptSampler
    step: int = 0
    """Training step under way, or done last."""
    prompts_seen: int = 0
    tokens_seen: int = 0
    """Response tokens trained on."""
    bad_updates: int = 0
    """Consecutive optimizer updates, up to now, that were skipped because loss or gradient was not finite."""
    unfinished: list[int] = field(default_factory=list)
    """Prompts, as indices, that were drawn and not trained on or dropped when a step ended, in order: with
    `train.max_staleness` above 0 their responses were under way, and a resumed run generates them again, with its
    current weights. Without staleness a step leaves nothing over."""
    wandb_id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self._counters(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Raises UserError when it was taken over other data, when a key is missing
        and when a value cannot be one."""
        # A state without the key is of a run without staleness.
        state = {"unfinished": []} | state
        try:
            self.sampler.load_state_dict(state["sampler"])
            for name in self._counters():
                setattr(self, name, state[name])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the state of the checkpoint of step {state.get('step')} is not that of a run "
                f"({type(error).__name__}: {error}): put its state.json back, or remove the checkpoint"
            ) from error

    def _counters(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "sampler"}
