"""Measured times of a run in place of assumed ones."""

from dataclasses import dataclass
from pathlib import Path

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.plan.duration import TIMED, StepTokens
from meds_megatron.run.reader import read_run


@dataclass(frozen=True)
class Measured:
    """Means of a run's steps, the first, which warms up, left out."""

    config: Config
    """Config of the run."""
    steps: int
    tokens: StepTokens
    seconds: dict[str, float]
    """Seconds of each phase of TIMED."""


def measure(directory: str | Path, prompt_share: float) -> Measured:
    """Means over the lines of the metrics of a run that are training steps.

    Prompts, of which metrics have no length, have `prompt_share` of `rollout.max_prompt_tokens`. Raises UserError when
    the directory has no run or fewer than two steps, and for a run whose engines generated while the trainer computed:
    its metrics do not include the time of generation.
    """
    run = read_run(directory)
    directory, config = run.path, run.config
    if config.train.max_staleness > 0:
        raise UserError(
            f"{directory}: phases of a run with train.max_staleness = {config.train.max_staleness} overlap, and cannot "
            "calibrate; give a run with train.max_staleness=0."
        )
    lines = [line for line in run.metrics if "time/rollout" in line and "policy/updates" in line]
    if len(lines) < 2:
        raise UserError(
            f"{directory}/metrics.jsonl has {len(lines)} finished steps, and a calibration needs 2 or more, since "
            "the first is a warm-up; give a longer run."
        )
    lines = lines[1:]

    def mean(name: str) -> float:
        return sum(line.get(name, 0.0) for line in lines) / len(lines)

    generated = mean("response/count")
    kept = sum(line["response/count"] * line["filter/kept_share"] for line in lines) / len(lines)
    return Measured(
        config=config,
        steps=len(lines),
        tokens=StepTokens(
            generated=generated,
            trained=kept,
            prompt=prompt_share * config.rollout.max_prompt_tokens,
            response=mean("response/length_mean"),
        ),
        seconds={phase: mean(f"time/{phase}") for phase in TIMED},
    )
