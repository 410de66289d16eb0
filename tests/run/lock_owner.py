"""`python -m tests.run.lock_owner DIRECTORY`: a process that trains in a run directory, as its input says.

The run directory, its lock, the metrics and the checkpoints are the trainer's own; trainer ranks, memory shards and
engines are stand-ins that write a file each. A line of the input is a command and a step; the answer is a line: `done`,
or the sentence of the UserError. A claim here lasts LEASE_SECONDS.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from meds_megatron.config import Config
from meds_megatron.config.schema import CheckpointConfig, WandbConfig
from meds_megatron.data.sampler import PromptSampler
from meds_megatron.errors import UserError
from meds_megatron.run import lock as run_lock
from meds_megatron.run.console import Console
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog
from meds_megatron.run.rollout_files import ROLLOUT_SCHEMA
from meds_megatron.run.timer import PhaseTimer
from meds_megatron.trainer.checkpointer import Checkpointer
from meds_megatron.trainer.state import TrainerState

LEASE_SECONDS = 3.0


class Ranks:
    """Stands for the policy, the engines and the memory of a run. A part of a checkpoint is written when the save
    begins and the other one when it is finished, as ranks do that write during the next step."""

    def __init__(self, name: str):
        self._name = name
        self._directory = Path()

    def begin_save(self, directory: str) -> None:
        self._directory = Path(directory)
        (self._directory / "rng").mkdir(parents=True, exist_ok=True)
        (self._directory / "first").write_text(self._name)

    def finish_save(self) -> dict[str, str]:
        (self._directory / "second").write_text(self._name)
        return {}

    def save_written(self) -> bool:
        return True

    def random_states(self) -> dict[str, np.ndarray]:
        return {"engine": np.arange(3)}


class Owner:
    """Actions of one process in a run directory that it has claimed."""

    def __init__(self, run: RunDirectory, config: Config, name: str):
        self.run = run
        self.log = RunLog(run, config, Console(config, file=sys.stderr))
        self.ranks = Ranks(name)
        processes = SimpleNamespace(policy=self.ranks, pool=self.ranks, memory=Ranks(name), timer=PhaseTimer())
        self.state = TrainerState(PromptSampler(4, seed=0, shuffle=True))
        weight_sync = SimpleNamespace(version=0)
        self.checkpointer = Checkpointer(config, run, run.path / "model", processes, self.state, weight_sync)

    def metrics(self, step: int) -> None:
        self.log.log(step, {"accuracy/mean": 0.5})

    def rollouts(self, step: int) -> None:
        self.run.save_rollouts(step, {name: [] for name in ROLLOUT_SCHEMA.names if name != "step"})

    def checkpoint(self, step: int) -> None:
        """Completes the checkpoint under way and begins that of `step`."""
        self.state.step = step
        self.checkpointer.step_finished()

    def last(self, step: int) -> None:
        """As after a signal: the checkpoint of `step` is the last."""
        self.checkpointer.save_last()

    def complete(self, step: int) -> None:
        self.checkpointer.complete()

    def rewind(self, step: int) -> None:
        """As at the beginning of another attempt."""
        self.run.rewind(step)

    def step(self, step: int) -> None:
        """As the training loop."""
        self.metrics(step)
        self.rollouts(step)
        self.checkpoint(step)


def config_of(directory: Path) -> Config:
    return Config(
        run_dir=str(directory),
        checkpoint=CheckpointConfig(every=1, keep_last=3),
        wandb=WandbConfig(enabled=False),
    )


def main(directory: Path) -> None:
    run_lock.LEASE_SECONDS = LEASE_SECONDS
    config = config_of(directory)
    with RunDirectory(directory).claim(config) as run:
        checkpoint = run.newest_checkpoint()
        run.rewind(checkpoint.step if checkpoint else None)
        owner = Owner(run, config, run_lock.socket.gethostname())
        print("claimed", flush=True)
        for line in sys.stdin:
            command, step = line.split()
            try:
                getattr(owner, command)(int(step))
            except UserError as error:
                print(error, flush=True)
            else:
                print("done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
