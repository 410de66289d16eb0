"""The order in which problems are visited."""

from typing import Any

import numpy as np

from meds_megatron.errors import UserError


class PromptSampler:
    """Walks over `size` problems epoch after epoch, each epoch in an order of its own.

    The order of an epoch depends on the seed and the epoch's number alone, so epoch and position are the whole state.
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise UserError(f"A sampler needs at least one problem, but there are {size}: check data.train")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._order_of(0)

    def next(self, count: int) -> list[int]:
        """The next `count` indices into the problems; across the end of an epoch, an index may come twice."""
        indices: list[int] = []
        while len(indices) < count:
            if self.position == self.size:
                self._move_to(self.epoch + 1, 0)
            taken = self._order[self.position : self.position + count - len(indices)]
            indices.extend(taken.tolist())
            self.position += len(taken)
        return indices

    def state_dict(self) -> dict[str, Any]:
        """Where the walk stands, and over what, as plain JSON values."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; UserError when it was taken over other data or in another order."""
        for name, key in (("size", "the number of problems"), ("seed", "train.seed"), ("shuffle", "data.shuffle")):
            here, saved = getattr(self, name), state[name]
            if here != saved:
                raise UserError(
                    f"The saved sampler cannot go on: {key} was {saved} and is {here} now: restore it, or start anew"
                )
        self._move_to(state["epoch"], state["position"])

    def _move_to(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        """[size] problem indices in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)
