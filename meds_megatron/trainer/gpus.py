"""Owner of the GPU memory that engines and trainer ranks share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.protocols import Engines, Policy


class Gpus:
    """Hands GPUs that engines and trainer ranks share from the ones to the others: nothing else puts engines to sleep
    or wakes them, onloads or offloads the policy. With `rollout.nodes` engines have GPUs of their own and never sleep.

    Engines that sleep either keep their weights, in the host's memory, or drop them and lack weights until the next
    weight update. The policy's gradients and, with `train.offload_optimizer`, its optimizer state are on shared GPUs
    during updates only.
    """

    def __init__(self, engines: Engines, policy: Policy, timer: PhaseTimer) -> None:
        self._engines, self._policy, self._timer = engines, policy, timer

    def wake_engines(self) -> None:
        """Gives the engines memory for weights and KV cache: they can generate."""
        with self._timer("sync"):
            self._wake("weights")
            self._wake("kv_cache")

    def wake_kv_cache(self) -> None:
        """Gives engines whose weights are awake memory for the KV cache: they can generate."""
        with self._timer("sync"):
            self._wake("kv_cache")

    def pause_engines(self) -> None:
        """Makes room for a forward pass of the trainer, after which the engines generate with the same weights."""
        with self._timer("sync"):
            self._engines.sleep(keep_weights=True)

    def release_engines(self) -> None:
        """Makes room for the trainer; engines that are awake drop their weights, since they get others next."""
        with self._timer("sync"):
            self._engines.sleep(keep_weights=False)

    @contextmanager
    def held_by_trainer(self) -> Iterator[None]:
        """The policy is updated in the block. After it the engines have memory for weights, but not for a KV cache."""
        self.release_engines()
        with self._timer("sync"):
            self._policy.onload()
        with self._timer("update"):
            yield
        with self._timer("sync"):
            self._wake("weights")

    def _wake(self, part: Literal["weights", "kv_cache"]) -> None:
        if self._engines.asleep:
            self._policy.offload()
            self._engines.wake(part)
