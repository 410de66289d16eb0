"""Sampling parameters of a prompt, and the environment variables of an engine's process: both from the config."""

from dataclasses import dataclass

from meds_megatron.config import Config, RolloutConfig
from meds_megatron.config.network import network_env_vars


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a prompt."""

    responses: int
    """Responses to each prompt."""
    max_tokens: int
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    stop: bool = True
    """False ignores end-of-sequence tokens: every response has `max_tokens` (benchmarks)."""
    seed: int | None = None
    """Seed of the prompt's own generator, response i has `seed` + i; None draws from the engine's. Costs speed
    (`meds bench rollout`), and without CUDA vLLM fails when a step's token budget cuts a seeded prompt, which engines
    of an evaluation avoid."""

    @classmethod
    def training(cls, config: RolloutConfig) -> "Sampling":
        return cls(
            config.responses_per_prompt, config.max_response_tokens, config.temperature, config.top_p, config.top_k
        )

    @classmethod
    def validation(cls, config: RolloutConfig) -> "Sampling":
        return cls(
            config.validation_responses,
            config.max_response_tokens,
            config.validation_temperature,
            config.validation_top_p,
        )


def engine_env_vars(config: Config, use_gpu: bool) -> dict[str, str]:
    """Variables that vLLM and torch read in an engine's process and in the processes that vLLM starts from it."""
    variables = {
        # The scheduler runs in the engine's own process, so that its order of events is repeatable.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # Errors are raised; vLLM's warnings at every start and update would hide the run's own lines.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "VLLM_NO_USAGE_STATS": "1",
        # Names of requests end in a random suffix, which `RolloutEngine` cuts off.
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **network_env_vars(config.cluster),
    }
    if not use_gpu:
        # Trainer ranks and engines share the cores: no process binds its threads to some.
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(config.rollout.threads)}
        if config.rollout.enforce_eager:
            # vLLM compiles a small function of its sampler even then: half a minute of a new machine's first run.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
