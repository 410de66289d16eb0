"""The environment variables that vLLM and torch read in an engine's process: all of them, from the config."""

from meds_megatron.config import Config


def engine_environment(config: Config, use_gpu: bool) -> dict[str, str]:
    """Variables of an engine's process and of the processes that vLLM starts from it."""
    variables = {
        # The scheduler runs in the engine's own process: its order of events, and so its samples, can be repeated.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # What goes wrong is raised; vLLM's warnings at every start and update would bury the run's own lines.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not use_gpu:
        # Trainer ranks and engines share the cores, so none of them claims some for itself.
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(config.rollout.threads)}
        if config.rollout.enforce_eager:
            # vLLM compiles a small function of its sampler even then: half a minute of a new machine's first run.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
