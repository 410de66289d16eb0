"""What is asked of the engines for every prompt."""

from dataclasses import dataclass

from meds_megatron.config import RolloutConfig


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn."""

    responses: int
    """Of each prompt."""
    max_tokens: int
    temperature: float = 1.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""

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
