"""Ways to schedule generation and training, compared in simulated time on a cluster that nobody needs to have."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meds_megatron.bench.simulation.rates import rates_of
from meds_megatron.bench.simulation.run import SimulatedRun, simulate
from meds_megatron.bench.simulation.workload import CORRELATION, MATH500_QUANTILES, Workload, mean_of, read_lengths
from meds_megatron.config import Config, load_config
from meds_megatron.errors import UserError
from meds_megatron.plan import hardware
from meds_megatron.plan.plan import Plan, make_plan

DEFAULTS = Path(__file__).parent / "simulation" / "defaults.yaml"
SHARED = "sync, shared GPUs"
METHODS: dict[str, dict[str, Any]] = {
    SHARED: {"train.max_staleness": 0, "rollout.nodes": None},
    "sync": {"train.max_staleness": 0},
    "one step off": {"train.max_staleness": 1, "rollout.on_update": "finish"},
    "partial": {"train.max_staleness": 1, "rollout.on_update": "continue"},
    "partial, staleness 2": {"train.max_staleness": 2, "rollout.on_update": "continue"},
}
"""Settings of each method. Where GPUs are shared, all of them are the trainer's and the engines', one after the
other."""


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

    Response lengths are those in `lengths_file` (`read_lengths`), or of the solutions of MATH-500, scaled to
    `mean_response` tokens (default: of a file as they are, else a quarter of the limit), with `correlation` between the
    responses to a prompt; `kept_share` of the groups pass the filter. Raises UserError for a run that `meds train`
    refuses; where it refuses to share the GPUs only, that method is left out, and `left_out` gives the reason.

    Keys: `rows`, one a method, and the assumptions. Of a method: mean seconds of a step and how many times as fast it
    is as `sync`; responses trained on a second; shares of the time in which the trainer, and the mean engine, did
    nothing; age of the tokens trained on, as the run's metrics `staleness/...`; and the share of the groups that passed
    the filter which no step had use for (`surplus`).
    """
    given = load_config(config_file or DEFAULTS, overrides)
    if given.rollout.nodes is None:
        raise UserError("rollout.nodes is not set: the methods that overlap need nodes for the engines; set it")
    quantiles = read_lengths(lengths_file) if lengths_file else MATH500_QUANTILES
    if mean_response is None:
        limit = given.rollout.max_response_tokens
        mean_response = mean_of(quantiles) if lengths_file else limit / 4
    steps = -(-answers // (given.train.prompts_per_step * given.rollout.responses_per_prompt))
    workload = _workload(given, steps, quantiles, mean_response, kept_share, correlation, seed)
    rows, rates, left_out = [], {}, {}
    for name, settings in METHODS.items():
        config = _with(given, {**settings, **(_all_gpus(given) if name == SHARED else {}), "train.steps": steps})
        try:
            plan = _plan(config, workload, kept_share)
        except UserError as error:
            if name != SHARED:
                raise
            left_out[name] = str(error)
            continue
        engine, trainer = rates_of(plan, grading_seconds)
        rates = {"engine": vars(engine), "trainer": vars(trainer)}
        gpus = config.cluster.ranks_per_node * (config.cluster.nodes + (config.rollout.nodes or 0))
        rows.append(_row(name, simulate(plan.config, engine, trainer, workload), workload, gpus))
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
        "rates": rates,
        "left_out": left_out,
    }


def _row(name: str, run: SimulatedRun, workload: Workload, gpus: int) -> dict:
    passed = sum(bool(workload.kept_P[int(prompt)]) for prompt in run.log.dropped)
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
        "surplus": passed / (passed + len(run.log.trained)),
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


def _plan(config: Config, workload: Workload, kept_share: float) -> Plan:
    mean = float(workload.lengths_PN.mean()) / config.rollout.max_response_tokens
    plan = make_plan(config, workload=hardware.Workload(mean_response_share=mean, kept_share=kept_share))
    if plan.refusal:
        raise UserError(plan.refusal)
    return plan


def _all_gpus(config: Config) -> dict[str, int]:
    """Settings with which trainer and engines share the nodes of both."""
    nodes = config.cluster.nodes + (config.rollout.nodes or 0)
    return {
        "cluster.nodes": nodes,
        "rollout.engines": nodes * (config.cluster.ranks_per_node // config.rollout.tensor),
    }


def _with(config: Config, settings: dict[str, Any]) -> Config:
    """A copy with other settings, by dotted key."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        setattr(getattr(config, section), name, value)
    return config
