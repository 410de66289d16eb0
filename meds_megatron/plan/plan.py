"""The plan of a run: everything that `meds plan` prints."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from meds_megatron.config import Config, ModelShape, ParallelLayout, validate, validate_model
from meds_megatron.plan.activations import micro_batches
from meds_megatron.plan.calibration import Measured, measure
from meds_megatron.plan.choices import with_choices
from meds_megatron.plan.duration import TIMED, StepTokens, step_seconds, step_tokens
from meds_megatron.plan.fit import Suggestion, problem, sentence, suggest
from meds_megatron.plan.hardware import CPU, H100, Hardware, Workload
from meds_megatron.plan.memory import Memory, plan_memory
from meds_megatron.plan.model import planned_on_gpu, planned_shape
from meds_megatron.plan.network import StepTraffic, step_traffic
from meds_megatron.plan.placement import PlacementRow, placement_rows


@dataclass(frozen=True)
class Calibration:
    """Measured times of a run and those predicted for it."""

    run_dir: str
    steps: int
    predicted: dict[str, float]
    measured: dict[str, float]

    @property
    def factors(self) -> dict[str, float]:
        """Factors that predictions are multiplied by."""
        return {phase: self.measured[phase] / self.predicted[phase] for phase in TIMED}


@dataclass(frozen=True)
class Plan:
    """A run before it starts."""

    config: Config
    shape: ModelShape
    layout: ParallelLayout
    hardware: Hardware
    on_gpu: bool
    placement: list[PlacementRow]
    memory: Memory
    tokens: StepTokens
    traffic: StepTraffic
    seconds: dict[str, float]
    """Seconds of each phase of TIMED, calibrated where there is a calibration."""
    suggestions: list[Suggestion]
    calibration: Calibration | None = None

    @property
    def refusal(self) -> str | None:
        """Why `meds train` refuses the run; None where it fits."""
        if problem(self.config, self.memory) is None:
            return None
        return sentence(self.config, self.memory, self.suggestions)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer update on one rank, of sequences of mean length."""
        return micro_batches(self.config, self.layout, self.tokens.prompt + self.tokens.response)

    @property
    def step_seconds(self) -> float:
        """Seconds of a whole step; with `train.max_staleness` above 0 engines generate while the trainer computes."""
        rollout, sync = self.seconds["rollout"], self.seconds["sync"]
        trainer = self.seconds["forward"] + self.seconds["update"]
        return sync + (max(rollout, trainer) if self.config.train.max_staleness > 0 else rollout + trainer)

    def to_dict(self) -> dict:
        """All of it as plain values for JSON: bytes, seconds, counts."""
        layout = asdict(self.layout) | {"stage_sizes": self.layout.stage_sizes(self.shape.num_layers)}
        return {
            "name": self.config.name,
            "fits": self.refusal is None,
            "refusal": self.refusal,
            "suggestions": [suggestion.changes for suggestion in self.suggestions],
            "device": "cuda" if self.on_gpu else "cpu",
            "model": asdict(self.shape),
            "layout": layout,
            "placement": [asdict(row) for row in self.placement],
            "memory": {
                "limit": self.memory.limit,
                "columns": {
                    name: {
                        "phase": peak.phase,
                        "node": peak.device.node,
                        "gpu": peak.device.gpu,
                        "stage": peak.device.stage,
                        "engine": peak.device.engine,
                        "total": peak.total,
                        "parts": peak.parts,
                    }
                    for name, peak in self.memory.columns.items()
                },
                "devices": [
                    {**asdict(demand.device), "phase": demand.phase, "total": demand.total, "parts": demand.parts}
                    for demand in self.memory.demands
                ],
            },
            "engine": asdict(self.memory.engine) | {"full_sequences": self.memory.engine.full_sequences},
            "step": asdict(self.tokens),
            "traffic": asdict(self.traffic),
            "seconds": self.seconds | {"step": self.step_seconds},
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "assumptions": asdict(self.hardware),
        }


def make_plan(
    config: Config,
    calibrate: str | Path | None = None,
    network_gbit: float | None = None,
    workload: Workload | None = None,
) -> Plan:
    """The plan of a run, with times calibrated by the run directory `calibrate`; without it its responses are assumed
    to be like `workload`.

    Raises UserError for a config that no machine can run, in the words of `meds train`, and for a model whose shape is
    not known. A run that is only too large has a plan with a `refusal`.
    """
    validate(config)
    shape = planned_shape(config)
    validate_model(config, shape)
    on_gpu = planned_on_gpu(config)
    hardware = H100 if on_gpu else CPU
    if network_gbit is not None:
        hardware = replace(hardware, network_gbit=network_gbit)
    if calibrate is None:
        return _plan(config, shape, on_gpu, hardware, step_tokens(config, workload or Workload()))
    measured = measure(calibrate, Workload.mean_prompt_share)
    theirs = _plan(measured.config, planned_shape(measured.config), on_gpu, hardware, measured.tokens)
    calibration = Calibration(str(calibrate), measured.steps, theirs.seconds, measured.seconds)
    plan = _plan(config, shape, on_gpu, hardware, scaled_tokens(measured, config))
    seconds = {phase: plan.seconds[phase] * factor for phase, factor in calibration.factors.items()}
    return replace(plan, seconds=seconds, calibration=calibration)


def scaled_tokens(measured: Measured, config: Config) -> StepTokens:
    """A step of `config` whose responses are as long, relative to the limit, and kept as often as in the run."""
    run, theirs = measured.tokens, measured.config
    steps: float = config.train.prompts_per_step * config.rollout.responses_per_prompt
    steps /= theirs.train.prompts_per_step * theirs.rollout.responses_per_prompt
    return StepTokens(
        generated=run.generated * steps,
        trained=run.trained * steps,
        prompt=run.prompt * config.rollout.max_prompt_tokens / theirs.rollout.max_prompt_tokens,
        response=run.response * config.rollout.max_response_tokens / theirs.rollout.max_response_tokens,
    )


def _plan(config: Config, shape: ModelShape, on_gpu: bool, hardware: Hardware, tokens: StepTokens) -> Plan:
    given, config = config, with_choices(config, shape, hardware, on_gpu, tokens)
    layout = ParallelLayout.from_config(config)
    memory = plan_memory(config, shape, layout, hardware, on_gpu)
    traffic = step_traffic(
        config,
        shape,
        layout,
        tokens=tokens.trained_tokens,
        local_bytes_per_second=hardware.local_gbyte * 1e9,
        network_bytes_per_second=hardware.network_gbit / 8 * 1e9,
    )
    return Plan(
        config=config,
        shape=shape,
        layout=layout,
        hardware=hardware,
        on_gpu=on_gpu,
        placement=placement_rows(config, shape, layout),
        memory=memory,
        tokens=tokens,
        traffic=traffic,
        seconds=step_seconds(config, shape, layout, hardware, tokens, memory, traffic),
        suggestions=suggest(given, shape, hardware) if problem(config, memory) else [],
    )
