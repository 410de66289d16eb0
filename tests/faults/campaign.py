"""Kills processes of runs at random moments and checks that nothing is lost: python -m tests.faults.campaign

Every run is killed at several times and must end with all its steps. Victims and moments come from --seed, which is
printed: the moments are delays, so a campaign is repeated in kind and not to the millisecond.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from meds_megatron.config import Config
from meds_megatron.memory import MemoryShard
from meds_megatron.toy_tasks.make import ensure_arithmetic_model
from tests.faults.processes import KINDS, RunProcess, running, shared_files
from tests.limits import HANG_SECONDS

DRIVER = "driver"
STEPS_A_KILL = 4
PROMPTS = 6
LONGEST_DELAY = 1.2
"""Seconds from a finished step to a kill: about a step and a half."""
MODEL_STEPS = 250


@dataclass(frozen=True)
class Kill:
    kind: str
    while_saving: bool
    delay: float
    """Seconds from a finished step, or from the beginning of a save."""

    def __str__(self) -> str:
        return f"{self.kind} {self.delay:.3f} s into a {'save' if self.while_saving else 'step'}"


def plan(kinds: list[str], seed: int, saving: float = 0.4) -> list[Kill]:
    """A kill of each of `kinds`, in random order; the share `saving` of them during saves of checkpoints."""
    draw = random.Random(seed)
    kills = []
    for kind in draw.sample(kinds, len(kinds)):
        while_saving = draw.random() < saving
        kills.append(Kill(kind, while_saving, draw.uniform(0, 0.05 if while_saving else LONGEST_DELAY)))
    return kills


class Run:
    """A run that is killed as planned. `finish` returns when it has made all its steps."""

    def __init__(self, directory: Path, model: Path, kills: list[Kill], tensor: int = 1):
        self.directory, self.kills, self.steps = directory, kills, STEPS_A_KILL * len(kills) + 2
        self.output = directory.with_suffix(".out")
        self.complete: dict[Path, str] = {}
        """Markers of the complete checkpoints that were there right after a kill."""
        self.orphans: list[psutil.Process] = []
        """Processes of killed drivers."""
        self._settings = self.settings(directory, model, self.steps, tensor)
        self._driver = RunProcess(self._settings, self.output)
        self._shared: set[Path] = set()
        self._newest_step = 0

    @staticmethod
    def settings(directory: Path, model: Path, steps: int, tensor: int = 1) -> list[str]:
        """Settings of a tiny run with two data-parallel ranks, and so two memory shards."""
        return [
            f"run_dir={directory}",
            "model.make=no",
            f"model.path={model}",
            "cluster.device=cpu",
            "parallel.pipeline=1",
            f"rollout.tensor={tensor}",
            f"data.limit_train={PROMPTS}",
            "filter.metric=none",
            "reward.overlong.buffer=38",
            "rollout.responses_per_prompt=4",
            f"train.steps={steps}",
            f"train.prompts_per_step={PROMPTS}",
            f"train.mini_batch_prompts={PROMPTS}",
            "train.micro_batch_tokens=384",
            "train.validate_every=0",
            "train.export_hf=false",
            "checkpoint.every=1",
            f"checkpoint.keep_last={steps}",
            "wandb.enabled=false",
        ]

    def finish(self, report: Callable[[str], None]) -> Counter:
        """Kills that were made, by kind, those during saves also as "during a save"."""
        made: Counter = Counter()
        for kill in self.kills:
            victim = self._kill(kill)
            self.complete |= {
                path: path.read_text() for path in self.directory.glob("checkpoints/step_*/complete.json")
            }
            report(f"{self.directory.name}: {kill}, process {victim}, {len(self.steps_made())} steps finished")
            made += Counter([kill.kind, "during a save"] if kill.while_saving else [kill.kind])
            if kill.kind == DRIVER:
                self._driver.wait()
                self._driver = RunProcess(self._settings, self.output)
        descendants = self._wait_for_end()
        if self._driver.returncode:
            raise AssertionError(f"exit code {self._driver.returncode}: {self.output.read_text()[-4000:]}")
        self._check_end(descendants)
        return made

    def steps_made(self) -> list[int]:
        metrics = self.directory / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def _kill(self, kill: Kill) -> int:
        """Waits for a step that no attempt made before, then for the moment; returns the process id of the victim."""
        for _ in self._polls(0.05):
            if max(self.steps_made(), default=0) > self._newest_step:
                victims = [self._driver] if kill.kind == DRIVER else self._driver.of_kind(kill.kind)
                if victims:
                    break
        self._newest_step = max(self.steps_made())
        victim = victims[round(kill.delay * 1e6) % len(victims)].pid
        descendants = self._driver.descendants()
        self._shared |= shared_files(descendants)
        if kill.kind == DRIVER:
            self.orphans += descendants
        if kill.while_saving:
            for _ in self._polls(0.001):
                if any(self.directory.glob("checkpoints/.step_*.partial")):
                    break
        time.sleep(kill.delay)
        os.kill(victim, signal.SIGKILL)
        return victim

    def _polls(self, seconds: float) -> Iterator[None]:
        deadline = time.monotonic() + HANG_SECONDS
        while time.monotonic() < deadline:
            if self._driver.poll() is not None:
                raise AssertionError(f"the run ended early: {self.output.read_text()[-4000:]}")
            yield
            time.sleep(seconds)
        raise AssertionError(f"nothing happened for {HANG_SECONDS} s: {self.output.read_text()[-4000:]}")

    def _wait_for_end(self) -> list[psutil.Process]:
        descendants = self._driver.descendants()
        deadline = time.monotonic() + HANG_SECONDS
        while self._driver.poll() is None and time.monotonic() < deadline:
            descendants = self._driver.descendants() or descendants
            self._shared |= shared_files(descendants)
            time.sleep(0.5)
        self._driver.wait(timeout=1)
        return descendants

    def _check_end(self, descendants: list[psutil.Process]) -> None:
        assert self.steps_made() == list(range(1, self.steps + 1)), self.steps_made()
        log = (self.directory / "logs" / "driver.log").read_text()
        resumed = [Path(line.split(" resumed from ")[1]) for line in log.splitlines() if " resumed from " in line]
        for path in resumed:
            assert (path / "complete.json").exists(), f"{path}, which was resumed from, is not complete"
        for marker, text in self.complete.items():
            assert marker.read_text() == text, f"{marker} was complete and has changed"
            sizes = {name: (marker.parent / name).stat().st_size for name in json.loads(text)["files"]}
            assert sizes == json.loads(text)["files"], f"{marker.parent} was complete and has changed"
        self._check_memory()
        # The last processes may take a moment.
        for _ in range(100):
            left = running([*descendants, *self.orphans])
            if not left:
                break
            time.sleep(0.1)
        assert not left, f"still running: {left}"
        left = [str(path) for path in self._shared if path.exists()]
        assert not left, f"left in shared memory: {left}"

    def _check_memory(self) -> None:
        """Every vector of every complete checkpoint is in those after it."""
        earlier: Counter = Counter()
        for directory in sorted(self.directory.glob("checkpoints/step_*/memory")):
            vectors = Counter(_vectors(directory))
            missing = earlier - vectors
            assert not missing, f"{directory} lacks {missing.total()} vectors of earlier checkpoints"
            earlier = vectors


def _vectors(directory: Path) -> Iterator[tuple[str, bytes]]:
    """Key and bytes of every remembered vector of a checkpoint."""
    shard = MemoryShard.load(directory)
    for key, history in shard._histories.items():
        yield from ((key, np.ascontiguousarray(record["vector"]).tobytes()) for record in history.records_N)
    for key, added in shard._pending.items():
        yield from ((key, np.ascontiguousarray(record["vector"]).tobytes()) for part in added for record in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=36, help="kills in all (default 36)")
    parser.add_argument("--each", type=int, default=6, help="kills of one run (default 6)")
    parser.add_argument("--seed", type=int, default=None, help="default: another one every time")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    kinds = [DRIVER, *KINDS]
    print(f"{options.kills} kills, --seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="meds-faults-") as temporary:
        model = ensure_arithmetic_model("shared", Path(Config().cache_dir).expanduser(), steps=MODEL_STEPS)
        made: Counter = Counter()
        runs = 0
        for first in range(0, options.kills, options.each):
            count = min(options.each, options.kills - first)
            kills = plan([kinds[(first + place) % len(kinds)] for place in range(count)], seed + first)
            tensor = 2 if any(kill.kind == "engine TP worker" for kill in kills) else 1
            run = Run(Path(temporary) / f"run{runs}", model, kills, tensor)
            made += run.finish(lambda line: print(line, flush=True))
            runs += 1
    saves = made.pop("during a save", 0)
    print(f"{made.total()} kills in {runs} runs, {saves} of them during saves; every run made all its steps")
    for kind in kinds:
        print(f"  {kind:<20} {made[kind]}")


if __name__ == "__main__":
    sys.exit(main())
