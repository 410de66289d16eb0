"""The parts of a training loop, real ones over those that a test gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from meds_megatron.config import Config
from meds_megatron.data.prompts import Prompt
from meds_megatron.faults.interruption import Interruption
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
from tests.doubles import ScriptedEnginePool, ScriptedPolicy, ScriptedProducer, ScriptedWeightSync


@dataclass
class Parts:
    """Scripted engines and policy; memory, run and log as a test needs them."""

    config: Config
    state: TrainerState
    prompts: Sequence[Prompt]
    producer: ScriptedProducer
    pool: ScriptedEnginePool
    policy: ScriptedPolicy
    weight_sync: ScriptedWeightSync
    memory: Any
    interruption: Interruption

    def __post_init__(self) -> None:
        self.timer = PhaseTimer()
        self.gpus = Gpus(self.pool, self.policy, self.timer)
        self.generation = Generation(
            self.config, self.producer, self.pool, self.weight_sync, self.gpus, self.interruption, self.timer
        )
        scorer = Scorer(self.config, self.policy, self.memory, self.generation, self.timer)
        prompts = Prompts(self.prompts, [], 0)
        self.collector = Collector(self.config, self.state, prompts, self.generation, scorer, self.gpus, self.timer)

    def loop(self, run: Any, log: Any) -> TrainingLoop:
        return TrainingLoop(
            config=self.config,
            state=self.state,
            collector=self.collector,
            generation=self.generation,
            policy=self.policy,
            memory=self.memory,
            gpus=self.gpus,
            validator=Validator(self.config, [], self.generation, self.timer),
            recorder=Recorder(self.config, run, log, self.pool, self.memory, self.timer),
            checkpointer=SimpleNamespace(step_finished=lambda: None, export_if_due=lambda step: None),
        )
