"""Ways to schedule generation and training, compared in simulated time on a cluster that nobody needs to have."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meds_megatron.bench.simulation.rates import rates_of
from meds_megatron.bench.simulation.run import SimulatedRun, simulate
from meds_megatron.bench.simulation.workload import CORRELATION, MATH500_QUANTILES, Workload, read_lengths
from meds_megatron.config import Config, load_config
from meds_megatron.errors import UserError
from meds_megatron.plan import hardware
from meds_megatron.plan.plan import make_plan

DEFAULTS = Path(__file__).parent / "simulation" / "defaults.yaml"
METHODS: dict[str, dict[str, Any]] = {
    "sync, shared GPUs": {"rollout.nodes": None, "train.max_staleness": 0},
    "sync": {"train.max_staleness": 0},
    "one step off": {"train.max_staleness": 1, "rollout.on_update": "finish"},
    "partial": {"train.max_staleness": 1, "rollout.on_update": "continue"},
    "partial, staleness 2": {"train.max_staleness": 2, "rollout.on_update": "continue"},
}
"""Settings of each."""


def run(
    config_file: str | None,
    overrides: Sequence[str],
    answers: int = 100_000,
    lengths_file: str | None = None,
    mean_response: float | None = None,
    kept_share: float = 0.5,
    correlation: float = CORRELATION,
    grading_seconds: float = 0.1,
    seed: int = 0,
) -> dict:
    """Simulates as many steps as train on `answers` responses, with each of METHODS and the same responses.

    Responses are as long as `lengths_file` says (`read_lengths`), or the solutions of MATH-500, scaled to
    `mean_response` tokens (default: of a file as they are, else a quarter of the limit), as similar within a prompt as
    `correlation` says; `kept_share` of the groups pass the filter. Keys: `rows`, one a method, and the assumptions.
    Raises UserError for a config that no machine can run.
    """
    given = load_config(config_file or DEFAULTS, overrides)
    if given.rollout.nodes is None:
        raise UserError("rollout.nodes is not set: the methods that overlap need nodes for the engines; set it")
    quantiles = read_lengths(lengths_file) if lengths_file else MATH500_QUANTILES
    if mean_response is None:
        limit = given.rollout.max_response_tokens
        mean_response = sum(quantiles) / len(quantiles) if lengths_file else limit / 4
    steps = -(-answers // (given.train.prompts_per_step * given.rollout.responses_per_prompt))
    workload = _workload(given, steps, quantiles, mean_response, kept_share, correlation, seed)
    rows, assumptions = [], {}
    for name, settings in METHODS.items():
        config = _with(given, {**settings, "train.steps": steps})
        assumed = hardware.Workload(
            mean_response_share=float(workload.lengths_PN.mean()) / config.rollout.max_response_tokens,
            kept_share=kept_share,
        )
        plan = make_plan(config, workload=assumed)
        rates = rates_of(plan, grading_seconds)
        gpus = config.cluster.ranks_per_node * (config.cluster.nodes + (config.rollout.nodes or 0))
        rows.append(_row(name, simulate(plan.config, *rates, workload), gpus))
        assumptions = {"engine": vars(rates[0]), "trainer": vars(rates[1])}
    sync = next(row for row in rows if row["method"] == "sync")["step_s"]
    for row in rows:
        row["speed"] = sync / row["step_s"]
    return {
        "simulated": True,
        "rows": rows,
        "steps": steps,
        "responses": {
            "lengths": lengths_file or "solutions of MATH-500, scaled",
            "mean": float(workload.lengths_PN.mean()),
            "longest": int(workload.lengths_PN.max()),
            "cut_share": float((workload.lengths_PN == given.rollout.max_response_tokens).mean()),
            "correlation": correlation,
            "kept_share": kept_share,
        },
        "hardware": hardware.H100.name,
        "rates": assumptions,
    }


def _row(name: str, run: SimulatedRun, gpus: int) -> dict:
    responses = sum(count for count, _ in run.updates)
    return {
        "method": name,
        "gpus": gpus,
        "step_s": run.seconds / len(run.log.steps),
        "speed": 1.0,
        "responses_per_s": responses / run.seconds,
        "trainer_idle": 1 - run.trainer_busy / run.seconds,
        "engines_idle": 1 - run.engines_busy / run.seconds,
        "staleness_mean": run.mean("staleness/mean"),
        "staleness_max": max(step.get("staleness/max", 0) for step in run.log.steps),
        "mixed_share": run.mean("staleness/mixed_share"),
        "answers": responses,
    }


def _workload(
    config: Config,
    steps: int,
    quantiles: Sequence[float],
    mean: float,
    kept_share: float,
    correlation: float,
    seed: int,
) -> Workload:
    """Enough prompts that none comes twice."""
    train, rollout = config.train, config.rollout
    batch = config.filter.generation_prompts or train.prompts_per_step
    prompts = int((steps + 3) * (train.prompts_per_step / kept_share + batch))
    prompt_tokens = round(hardware.Workload.mean_prompt_share * rollout.max_prompt_tokens)
    return Workload(
        quantiles,
        mean,
        rollout.max_response_tokens,
        prompts,
        rollout.responses_per_prompt,
        prompt_tokens,
        kept_share,
        correlation,
        seed,
    )


def _with(config: Config, settings: dict[str, Any]) -> Config:
    """A copy with other settings, by dotted key."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    return config
