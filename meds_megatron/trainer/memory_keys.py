"""Which responses the memory is asked about, and under which key."""

from meds_megatron.config import Config
from meds_megatron.trainer.groups import Sample
from meds_megatron.trainer.memory_row import UNBOXED

TARGETS = {"wrong": (False,), "right": (True,), "both": (False, True), "none": ()}
UNJUDGED = ("timeout", "error")
"""Where grading failed, nobody knows whether the response is a mistake."""


def memory_key(sample: Sample) -> str:
    """Problem and correctness group of a response."""
    return f"{sample.prompt.problem.id}|{'right' if sample.grade.correct else 'wrong'}"


def key_to_ask(sample: Sample, config: Config) -> str | None:
    """The key to look up and remember a response under; None where it is none of the memory's business.

    A targeted wrong answer without a fingerprint has a key of its own, if such answers are not to escape.
    """
    if sample.grade.correct not in TARGETS[config.penalty.target] or sample.grade.outcome in UNJUDGED:
        return None
    if sample.has_fingerprint:
        return memory_key(sample)
    if config.memory.no_answer == "own_cluster" and not sample.grade.correct:
        return memory_key(sample) + UNBOXED
    return None
