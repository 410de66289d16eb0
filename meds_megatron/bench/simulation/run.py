"""A training run in simulated time: the real training loop, collector, schedule, producer and engine pool over
simulated engines, ranks and graders."""

import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np

from meds_megatron.bench.simulation.clock import Clock
from meds_megatron.bench.simulation.parts import (
    NoMemory,
    SimulatedEnginePool,
    SimulatedGraders,
    SimulatedPolicy,
    SimulatedWeightSync,
    StepLog,
)
from meds_megatron.bench.simulation.rates import EngineRates, TrainerRates
from meds_megatron.bench.simulation.workload import Workload
from meds_megatron.config import Config
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.faults.interruption import Interruption
from meds_megatron.rollout.producer import GroupProducer
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.collector import Collector
from meds_megatron.trainer.generation import Generation
from meds_megatron.trainer.gpus import Gpus
from meds_megatron.trainer.loop import TrainingLoop
from meds_megatron.trainer.prompts import Prompts
from meds_megatron.trainer.recorder import Recorder
from meds_megatron.trainer.scorer import Scorer
from meds_megatron.trainer.state import TrainerState
from meds_megatron.trainer.validation import Validator


@dataclass(frozen=True)
class SimulatedRun:
    """Result of a run of `config.train.steps` steps."""

    log: StepLog
    unfinished: list[int]
    """Prompts that were drawn and neither trained on nor dropped."""
    drawn: int
    """Prompts that were drawn."""
    updates: list[tuple[int, int]]
    """Responses and tokens of each update."""
    seconds: float
    """Seconds from the first step to the end of the last."""
    trainer_busy: float
    """Seconds of forward passes, updates, copies and weight updates."""
    engines_busy: float
    """Seconds of prefill, decode steps and weight updates, the mean of the engines."""

    def mean(self, metric: str, weight: str | None = None) -> float:
        """Mean of a metric over the steps, 0 in those without it; weighted by another if given."""
        values = [step.get(metric, 0.0) for step in self.log.steps]
        return float(np.average(values, weights=[step[weight] for step in self.log.steps] if weight else None))


def simulate(
    config: Config,
    engine_rates: EngineRates,
    trainer_rates: TrainerRates,
    workload: Workload,
    deaths: tuple[tuple[float, int], ...] = (),
) -> SimulatedRun:
    """Trains for `config.train.steps` steps. The processes of engines die at `deaths`: (seconds from the first step,
    engine)."""
    config = copy.deepcopy(config)
    config.penalty.target = "none"
    config.train.validate_every = 0
    config.train.save_rollouts = config.train.export_hf = False
    clock = Clock()
    pool = SimulatedEnginePool(config, clock, engine_rates, workload)
    pool.start()
    policy, graders = SimulatedPolicy(clock, trainer_rates), SimulatedGraders(clock, trainer_rates)
    weight_sync = SimulatedWeightSync(clock, trainer_rates, pool)
    weight_sync.update()
    state = TrainerState(PromptSampler(len(workload.prompts), config.train.seed, shuffle=False))
    timer = PhaseTimer(clock=lambda: clock.now)
    memory, log = NoMemory(), StepLog()
    gpus = Gpus(pool, policy, timer)
    producer = GroupProducer(pool, graders, config)
    generation = Generation(config, producer, pool, weight_sync, gpus, Interruption(), timer)
    scorer = Scorer(config, policy, memory, generation, timer)
    training = TrainingLoop(
        config=config,
        state=state,
        collector=Collector(config, state, Prompts(workload.prompts, [], 0), generation, scorer, gpus, timer),
        generation=generation,
        policy=policy,
        memory=memory,
        gpus=gpus,
        validator=Validator(config, [], generation, timer),
        recorder=Recorder(config, SimpleNamespace(started=True), log, pool, memory, timer),
        checkpointer=SimpleNamespace(step_finished=lambda: None, export_if_due=lambda step: None),
    )
    begun = clock.now
    busy = {part: part.busy_seconds for part in (policy, weight_sync, pool)}
    for seconds, engine in deaths:
        clock.after(seconds, partial(pool.kill, engine))
    training.train()
    policy_busy, sync_busy, engines_busy = (part.busy_seconds - busy[part] for part in (policy, weight_sync, pool))
    sampler = state.sampler
    return SimulatedRun(
        log,
        state.unfinished,
        sampler.epoch * sampler.size + sampler.position,
        policy.trained,
        clock.now - begun,
        policy_busy + sync_busy,
        engines_busy / config.rollout.engines,
    )
