"""What every rank of an engine can do beside vLLM's own work; vLLM mixes this class into its workers."""

from vllm.utils.torch_utils import set_random_seed

from meds_megatron.weights.resharding.messages import Checksums


class EngineRank:
    def seed_sampling(self, seed: int) -> None:
        """Starts the generators that samples are drawn from anew. Tensor-parallel ranks need the same seed: each of
        them samples, and they must agree."""
        set_random_seed(seed)

    def weight_checksums(self) -> Checksums:
        """Of the group of weights that came last, where its update asked for them."""
        return self.weight_transfer_engine.checksums
