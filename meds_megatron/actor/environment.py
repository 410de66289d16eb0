"""The environment variables that torch and NCCL read in a trainer rank: all of them, from the config."""

from meds_megatron.config import Config


def rank_environment(config: Config) -> dict[str, str]:
    """Variables of every trainer rank's process."""
    return {
        "OMP_NUM_THREADS": str(config.cluster.threads_per_rank),
        "MKL_NUM_THREADS": str(config.cluster.threads_per_rank),
        # Overlap of tensor-parallel communication and compute relies on one hardware queue.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_CUMEM_ENABLE": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # What goes wrong is raised; what torch and megatron-core warn of at every start would bury the run's own lines.
        "PYTHONWARNINGS": "ignore::UserWarning,ignore::FutureWarning",
    }
