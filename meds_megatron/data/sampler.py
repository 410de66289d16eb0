"""The order in which problems are sampled."""

from typing import Any

import numpy as np

from meds_megatron.errors import UserError


class PromptSampler:
    """Infinite epochs over `size` problems, each epoch in a different order.

    The order of an epoch depends on the seed and the epoch's number only, so epoch and position are the whole state.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise UserError(f"The sampler needs at least one problem, but there are {size}: check data.train")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._move_to(epoch=0, position=0)

    def next(self, count: int) -> list[int]:
        """The next `count` indices into the problems; an index may repeat where an epoch ends within them."""
        indices: list[int] = []
        while len(indices) < count:
            if self.position == self.size:
                self._move_to(self.epoch + 1, 0)
            taken = self._order[self.position : self.position + count - len(indices)]
            indices.extend(taken.tolist())
            self.position += len(taken)
        return indices

    def state_dict(self) -> dict[str, Any]:
        """Epoch, position and what the order depends on, as plain JSON values."""
        return {name: getattr(self, name) for name in ("epoch", "position", "size", "seed", "shuffle")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; UserError when it belongs to other data or to another order."""
        for name, key in (("size", "the number of problems"), ("seed", "train.seed"), ("shuffle", "data.shuffle")):
            here, saved = getattr(self, name), state[name]
            if here != saved:
                raise UserError(
                    f"The saved sampler does not match: {key} was {saved} and is {here} now: restore it, or start over"
                )
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        """Problem indices [size] in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)
