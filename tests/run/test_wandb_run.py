"""Records of a run by wandb itself, read back from its own files."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meds_megatron.config import Config
from meds_megatron.run import wandb_run
from meds_megatron.run.code_version import checkout_commit, code_version
from meds_megatron.run.directory import RunDirectory
from tests.limits import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("processes")

TWO_ATTEMPTS = """
import json, sys
import numpy as np
from meds_megatron.config import Config
from meds_megatron.run.console import Console
from meds_megatron.run.directory import RunDirectory
from meds_megatron.run.log import RunLog

config = Config(name="recorded", run_dir=sys.argv[1])
config.wandb.responses, config.wandb.responses_every = 3, 2
run = RunDirectory(config.run_dir)
run.path.mkdir()
columns = json.loads(sys.argv[2])
columns["penalty"] = [None if value is None else np.float32(value) for value in columns["penalty"]]
run_id = None
for steps in (1, 2, 3), (2, 3, 4):
    with RunLog(run, config, Console(config), run_id) as log:
        for step in steps:
            log.log(step, {"accuracy/mean": step / 10, "memory/lookup_seconds_shard_0": 1.0, "policy/kl": float("nan")})
            log.log_responses(step, columns)
        run_id = log.wandb_id
"""
RESPONSES = 8


def columns() -> dict[str, list]:
    """Columns of a step's rollout file; response 0 has neither penalty nor label."""
    texts = {name: [f"{name} {row}" for row in range(RESPONSES)] for name in ("key", "source", "prompt", "answer")}
    numbers = {name: [row / 4 for row in range(RESPONSES)] for name in ("score", "shaped_score", "advantage")}
    return {
        **texts,
        **numbers,
        "response": [f"</script> \u20ac {row}" for row in range(RESPONSES)],
        "outcome": ["graded"] * RESPONSES,
        "correct": [False] * RESPONSES,
        "penalty": [None, *(row / 8 for row in range(1, RESPONSES))],
        "cluster_label": [None, *range(1, RESPONSES)],
        "cluster_size": list(range(RESPONSES)),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run without a key that was stopped after step 3 and resumed from step 1."""
    directory = tmp_path_factory.mktemp("wandb")
    path = directory / "run"
    environment = {"PATH": os.environ["PATH"], "HOME": str(directory), "NETRC": str(directory / "none")}
    done = subprocess.run(
        [sys.executable, "-c", TWO_ATTEMPTS, path, json.dumps(columns())],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def attempts(run) -> list[list]:
    """wandb's records of both attempts."""
    return [list(records(file)) for file in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]


def records(file: Path) -> Iterator:
    """Records of a wandb file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, begun = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        begun += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(begun)
            begun = b""


def history(attempt: list) -> list[dict]:
    lines = [record.history.item for record in attempt if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line} for line in lines]


def test_both_attempts_are_one_wandb_run(attempts):
    ids = [record.run.run_id for attempt in attempts for record in attempt if record.WhichOneof("record_type") == "run"]
    assert len(attempts) == 2 and len(set(ids)) == 1 and ids[0]


def test_a_step_computed_again_is_recorded_again(attempts):
    lines = [[line for line in history(attempt) if "accuracy/mean" in line] for attempt in attempts]
    seen = [[(line["step"], line["accuracy/mean"]) for line in of_attempt] for of_attempt in lines]
    assert seen == [[(1, 0.1), (2, 0.2), (3, 0.3)], [(2, 0.2), (3, 0.3), (4, 0.4)]]


def test_step_is_the_axis_and_metrics_of_single_shards_are_hidden(attempts):
    metrics = [record.metric for record in attempts[0] if record.WhichOneof("record_type") == "metric"]
    by_glob = {metric.glob_name or metric.name: metric for metric in metrics}
    assert by_glob["*"].step_metric == "step"
    assert by_glob["memory/lookup_seconds_shard_*"].options.hidden and not by_glob["*"].options.hidden


def test_the_run_has_its_settings_and_its_code(attempts):
    (record,) = [record for record in attempts[0] if record.WhichOneof("record_type") == "run"]
    settings = {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert settings["penalty"]["alpha"] == Config().penalty.alpha
    assert settings["code"]["torch"] == code_version()["torch"]


def test_sample_responses_are_a_table(run, attempts):
    lines = [line for line in history(attempts[0]) if "samples/responses/path" in line]
    logged = {line["step"]: line["samples/responses/path"] for line in lines}
    assert list(logged) == [1, 2]
    file = next(run.glob(f"wandb/offline-run-*/files/{logged[2]}"))
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["cluster_size"] for row in rows] == [0, 4, 7]
    assert [row["penalty"] for row in rows] == [None, 0.5, 0.875]
    assert [row["cluster_label"] for row in rows] == [None, 4, 7]
    assert rows[1]["response"] == "</script> \u20ac 4" and rows[1]["step"] == 2


def test_a_run_that_cannot_go_online_keeps_its_id(tmp_path, monkeypatch, caplog):
    """Nothing listens on the port of the server."""
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_run, "TIMEOUT_SECONDS", 2)
    recorded = wandb_run.WandbRun(RunDirectory(tmp_path), Config(), "ab12cd34")
    recorded.finish(failed=False)
    wandb.teardown()
    assert "wandb cannot go online" in caplog.text
    assert len(list((tmp_path / "wandb").glob("offline-run-*-ab12cd34*"))) == 1


def test_the_commit_is_that_of_the_files(tmp_path):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "__init__.py"
    file.write_text("")
    assert checkout_commit(file.parent) == ""
    git("init", "--quiet")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "--quiet", "--message", "other")
    assert checkout_commit(file.parent) == ""
    git("add", ".")
    git("commit", "--quiet", "--message", "package")
    assert checkout_commit(file.parent) == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert checkout_commit(file.parent) == git("rev-parse", "HEAD") + "-dirty"
