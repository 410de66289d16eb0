import json
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from meds_megatron.config import Config
from meds_megatron.errors import UserError
from meds_megatron.run.console import Console
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog
from meds_megatron.run.timer import PhaseTimer
from tests.limits import HANG_SECONDS


@pytest.fixture
def config(tmp_path):
    config = Config(run_dir=str(tmp_path))
    config.wandb.enabled = False
    return config


def test_every_step_is_a_line_that_is_there_at_once(config):
    run = RunDirectory(config.run_dir)
    with RunLog(run, config, Console(config)) as log:
        log.log(0, {"validation/accuracy": 0.1})
        log.log(1, {"accuracy/mean": np.float32(0.25), "memory/clusters": np.int64(3)})
        lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [
        {"step": 0, "validation/accuracy": 0.1},
        {"step": 1, "accuracy/mean": 0.25, "memory/clusters": 3},
    ]


def test_values_that_are_not_finite_stay_valid_json(config):
    run = RunDirectory(config.run_dir)
    with RunLog(run, config, Console(config)) as log:
        log.log(1, {"policy/kl": float("nan"), "policy/grad_norm": np.float64("inf")})
    assert json.loads(run.metrics.read_text()) == {"step": 1, "policy/kl": None, "policy/grad_norm": None}


def test_phases_add_up_and_start_anew():
    timer = PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.02)
    with timer("update"):
        time.sleep(0.01)
    times = timer.take()
    assert list(times) == ["time/rollout", "time/update", "time/step"]
    assert times["time/rollout"] >= 0.04
    assert times["time/step"] >= times["time/rollout"] + times["time/update"]
    assert list(timer.take()) == ["time/step"]


def test_the_console_shows_a_phase_as_it_begins():
    shown = []
    timer = PhaseTimer(SimpleNamespace(phase=shown.append))
    with timer("forward"):
        assert shown == ["forward"]


OFFLINE_RUN = """
import socket, sys
from meds_megatron.config import Config
from meds_megatron.run.console import Console
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog

class NoNetwork(socket.socket):
    def connect(self, address):
        assert self.family == socket.AF_UNIX, f"connected to {address}"
        return super().connect(address)

socket.socket = NoNetwork
config = Config(name="offline", run_dir=sys.argv[1])
run = RunDirectory(config.run_dir)
run.path.mkdir()
with RunLog(run, config, Console(config), sys.argv[2]) as log:
    log.log(1, {"accuracy/mean": 0.5})
    assert log.wandb_id == sys.argv[2]
"""


@pytest.mark.usefixtures("processes")
def test_without_a_key_wandb_is_offline_and_prompts_for_nothing(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(tmp_path / "run"), "ab12cd34"],
        env=environment,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*-ab12cd34"))) == 1
    assert "api_key" not in (done.stdout + done.stderr).lower()
    assert not (tmp_path / "wandb").exists()


@contextmanager
def disk_with(free_bytes: int):
    """No file can grow beyond `free_bytes`."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_full_disk_is_one_sentence_and_tears_no_line(tmp_path):
    config = Config(run_dir=str(tmp_path))
    config.wandb.enabled = False
    run = RunDirectory(tmp_path)
    with RunLog(run, config, Console(config)) as log:
        log.log(1, {"accuracy/mean": 0.5})
        whole = run.metrics.read_bytes()
        with (
            disk_with(len(whole) + 10),
            pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(.*\): make"),
        ):
            log.log(2, {"accuracy/mean": 0.25})
        assert run.metrics.read_bytes() == whole
        log.log(2, {"accuracy/mean": 0.25})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2]


def test_a_value_that_is_not_finite_is_named(tmp_path, caplog):
    config = Config(run_dir=str(tmp_path))
    config.wandb.enabled = False
    with RunLog(RunDirectory(tmp_path), config, Console(config)) as log:
        log.log(3, {"accuracy/mean": 0.5, "mismatch/logprob_abs_mean": float("nan")})
    assert "step 3: not finite: mismatch/logprob_abs_mean" in caplog.text
