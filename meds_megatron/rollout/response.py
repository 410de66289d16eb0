"""What a rollout gives back for one sample."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Response:
    """One response of the model. T: its tokens, an end-of-sequence token included when the model gave one."""

    prompt_index: int
    """Index into the prompts that generation was asked for."""
    token_ids: list[int]
    """[T]"""
    logprobs: list[float]
    """[T] log-probability of each token as it was sampled: temperature, top-p and top-k applied."""
    text: str
    """The tokens as text, special tokens left out."""
    finish_reason: Literal["stop", "length"]
    weights_version: int
    """Version of the weights that made it."""
    boxed_token: int = -1
    """Index in `token_ids` of the token that holds the `{` of the last `\\boxed{`; -1: there is no fingerprint."""
    no_fingerprint_reason: str = ""
    """Why not (`rollout.boxed` has the reasons); empty when it has one."""
