"""Whole runs that resume: the same bits on one layout, the same results on another, everything in the checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from meds_megatron.memory.snapshot import read_snapshot
from tests.meds_runs import PUBLISHED_RUN, metrics_of

MEASURED = ("time/", "throughput/")
STEPS, SAVED_STEP = 4, 2
SETTINGS = {
    "data.limit_train": 8,
    "data.limit_validation": 4,
    "filter.metric": "none",
    "train.steps": STEPS,
    "train.prompts_per_step": 4,
    "train.mini_batch_prompts": 2,
    "train.validate_every": 2,
    "train.export_hf": "false",
    "checkpoint.every": SAVED_STEP,
}


def cut_off(run_dir: Path, step: int, target: Path) -> Path:
    """A copy of a finished run as if it had been killed before its last checkpoint was complete."""
    shutil.copytree(run_dir, target)
    checkpoints = sorted((target / "checkpoints").iterdir())
    assert checkpoints[0].name == f"step_{step:06d}" and len(checkpoints) == 2
    (checkpoints[1] / "complete.json").unlink()
    with open(target / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 5, "torn')
    return target


def results_of(run_dir: Path) -> list[dict]:
    """Metrics without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if not name.startswith(MEASURED) and "seconds" not in name}
        for line in metrics_of(run_dir)
    ]


def rollouts_of(run_dir: Path) -> dict[str, list]:
    files = sorted((run_dir / "rollouts").iterdir())
    return {file.name: pq.read_table(file).to_pylist() for file in files}


def memory_of(checkpoint: Path, before_step: int | None = None) -> dict[str, list[bytes]]:
    """Vectors of every key, of all shards."""
    vectors = {}
    for file in (checkpoint / "memory").iterdir():
        for key, records_N in read_snapshot(file).clustered.items():
            kept = records_N if before_step is None else records_N[records_N["step"] < before_step]
            if len(kept):
                vectors[key] = [record["vector"].tobytes() for record in kept]
    return vectors


def tensors_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """Model and optimizer as torch reads them."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from meds_megatron.weights.conversion.checkpoint import read_metadata

    stored = read_metadata(checkpoint / ".metadata").state_dict_metadata
    assert all(isinstance(entry, TensorStorageMetadata) for entry in stored.values())
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    load(tensors, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def whole(run_meds, cpu_engines, small_model, tmp_path_factory) -> Path:
    """A run of 4 steps with checkpoints after 2 and 4."""
    return run_meds.finished_run(tmp_path_factory.mktemp("resume") / "whole", small_model, SETTINGS)


@pytest.fixture(scope="module")
def resumed(run_meds, whole, small_model, tmp_path_factory) -> Path:
    """The same run, cut off after the checkpoint of step 2."""
    directory = cut_off(whole, SAVED_STEP, tmp_path_factory.mktemp("resume") / "resumed")
    return run_meds.finished_run(directory, small_model, SETTINGS)


def test_four_steps_are_two_and_two_to_the_last_bit(whole, resumed):
    assert [line["step"] for line in results_of(whole)] == list(range(STEPS + 1))
    assert results_of(resumed) == results_of(whole)
    assert len(rollouts_of(whole)) == STEPS
    assert rollouts_of(resumed) == rollouts_of(whole)
    assert any(row["cluster_size"] > 2 for row in rollouts_of(whole)["step_000004.parquet"])


def test_the_checkpoints_agree_key_by_key(whole, resumed):
    """Fails when something that changes over a run is missing in a checkpoint."""
    import torch

    last, found = (directory / "checkpoints" / "step_000004" for directory in (whole, resumed))
    files = {path.relative_to(last) for path in last.rglob("*")}
    assert {path.relative_to(found) for path in found.rglob("*")} == files
    expected = json.loads((last / "state.json").read_text())
    assert json.loads((found / "state.json").read_text()) == expected
    assert expected["state"]["sampler"]["position"] + 8 * expected["state"]["sampler"]["epoch"] == 16
    for rank in ("rank00000.pt", "rank00001.pt"):
        states = [torch.load(path / "rng" / rank, weights_only=True) for path in (last, found)]
        assert states[0].keys() == states[1].keys() >= {"python", "numpy", "torch", "megatron"}
        for name in states[0]:
            torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0) if isinstance(
                states[0][name], torch.Tensor | dict
            ) else _assert_equal(states[1][name], states[0][name])
    engines = [np.load(path / "rng" / "engines.npz") for path in (last, found)]
    assert list(engines[0]) == list(engines[1]) == ["engine0.rank0.cpu"]
    assert all(np.array_equal(engines[0][name], engines[1][name]) for name in engines[0])
    assert memory_of(found) == memory_of(last)
    tensors, theirs = tensors_of(found), tensors_of(last)
    assert tensors.keys() == theirs.keys()
    assert sum(name.startswith("optimizer.exp_avg_sq.") for name in tensors) > 20
    for name, values in theirs.items():
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)


def _assert_equal(found, expected) -> None:
    assert found == expected


def test_a_run_resumes_on_another_layout(run_meds, published_run, small_model, tmp_path):
    """From PP2 x DP2 on four ranks to TP2 on two, and so from two memory shards to one."""
    directory = cut_off(published_run, 2, tmp_path / "other")
    layout = {"cluster.ranks_per_node": 2, "parallel.tensor": 2, "parallel.pipeline": 1}
    done = run_meds.train(directory, small_model, PUBLISHED_RUN | layout)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "resumed under another layout: random states start from scratch" in done.stdout + done.stderr
    (expected, found) = (results_of(path)[3] for path in (published_run, directory))
    assert found["step"] == 3
    assert found["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-4)
    assert found["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=1e-4)
    assert found["accuracy/mean"] == expected["accuracy/mean"]
    assert found["memory/lookup_size_mean"] == expected["memory/lookup_size_mean"] > 0
    saved = memory_of(published_run / "checkpoints" / "step_000002")
    assert memory_of(directory / "checkpoints" / "step_000003", before_step=2) == saved != {}


def test_a_checkpoint_becomes_a_model_that_transformers_loads(run_meds, whole, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint = whole / "checkpoints" / "step_000004"
    run_meds.check(run_meds.meds("convert", "to-hf", checkpoint, tmp_path / "hf"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    saved = tensors_of(checkpoint)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.detach().numpy(), saved[f"optimizer.param.{name}"], err_msg=name)


def test_a_run_passes_over_a_checkpoint_with_an_altered_bit_of_the_optimizer(run_meds, whole, small_model, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "altered")
    damaged = sorted((directory / "checkpoints" / "step_000004").glob("__1_optimizer_*.distcp"))[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x40
    damaged.write_bytes(content)
    run_meds.finished_run(directory, small_model, SETTINGS | {"train.steps": STEPS + 1})
    log = (directory / "logs" / "driver.log").read_text()
    assert f"{damaged} is altered" in log and "the checkpoint is passed over" in log
    assert f"resumed from {directory}/checkpoints/step_000002" in log
    assert [line["step"] for line in metrics_of(directory)] == list(range(STEPS + 2))


def test_a_run_with_other_settings_is_refused_by_name_and_changes_nothing(run_meds, whole, small_model):
    before = sorted(whole.rglob("*"))
    done = run_meds.train(whole, small_model, SETTINGS | {"train.steps": 6, "penalty.alpha": 0.3})
    assert done.returncode == 2
    assert "penalty.alpha: 0.1 -> 0.3" in done.stderr and "checkpoint.accept_changes=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(whole.rglob("*")) == before


def test_a_finished_run_is_left_as_it_is(run_meds, whole, small_model):
    before = (whole / "metrics.jsonl").read_bytes()
    done = run_meds.train(whole, small_model, SETTINGS)
    assert done.returncode == 0 and f"has finished its {STEPS} steps" in done.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before
