"""A whole run of real parts: engines, trainer ranks, graders and memory shards, from the command line to the export."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import hdbscan
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

STEPS = 3
PROMPTS = 6
RESPONSES = 8


@pytest.fixture(scope="module")
def run(small_model, tmp_path_factory, cpu_engines) -> Path:
    """The directory of a finished run over the same few problems in every step, on PP2 x DP2."""
    directory = tmp_path_factory.mktemp("run") / "small"
    command = [sys.executable, "-m", "meds_megatron.cli", "train", "configs/quickstart.yaml"]
    settings = {
        "run_dir": directory,
        "model.make": "no",
        "model.path": small_model,
        "cluster.device": "cpu",
        "cluster.ranks_per_node": 4,
        "data.limit_train": PROMPTS,
        "data.limit_validation": 4,
        "filter.metric": "none",
        "rollout.responses_per_prompt": RESPONSES,
        "train.steps": STEPS,
        "train.prompts_per_step": PROMPTS,
        "train.mini_batch_prompts": PROMPTS // 2,
        "train.micro_batch_responses": 4,
        "train.validate_every": STEPS,
        "train.export_every": 2,
        "optimizer.lr": 1e-4,
    }
    command += [f"{key}={value}" for key, value in settings.items()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def metrics(run) -> list[dict]:
    """One dict a step; the first is step 0, the validation before training."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_process_has_a_log_of_its_own(run):
    logs = {path.stem for path in (run / "logs").iterdir()}
    assert logs == {"driver", "engine000", "memory000", "memory001", *(f"rank{rank:05d}" for rank in range(4))}


def test_rollout_rows_hold_what_a_replay_needs(run):
    rows = pq.read_table(run / "rollouts" / "step_000002.parquet").to_pylist()
    assert all(len(row["response_token_ids"]) == row["response_tokens"] for row in rows)
    assert all(row["policy_version"] == 1 and row["source"].startswith("arithmetic/") for row in rows)
    looked_up = [row for row in rows if row["cluster_label"] is not None]
    assert looked_up and all(row["fingerprint"] is not None and not row["correct"] for row in looked_up)
    assert all(row["cluster_size"] == 0 for row in looked_up if row["cluster_label"] == -2)


def test_every_step_is_reported(metrics):
    assert [line["step"] for line in metrics] == list(range(STEPS + 1))
    for line in (metrics[0], metrics[-1]):
        assert line["validation/arithmetic/accuracy"] == line["validation/accuracy"]
    names = "accuracy/mean reward/mean reward/shaped_mean memory/clusters policy/entropy policy/grad_norm".split()
    names += [f"time/{phase}" for phase in ("step", "rollout", "reward", "forward", "memory", "update", "sync")]
    for line in metrics[1:]:
        assert set(names) <= set(line)
        assert line["response/count"] == PROMPTS * RESPONSES
        assert line["policy/updates"] == 2


def test_engines_and_trainer_agree_on_logprobs_after_every_update(metrics):
    for line in metrics[1:]:
        assert 0 < line["mismatch/logprob_abs_max"] < 1e-3


def test_first_update_of_a_step_is_on_policy(metrics):
    for line in metrics[1:]:
        assert line["policy/kl_first_update"] < 1e-7
        assert line["policy/kl"] > 1e-7


def test_recurring_mistakes_are_punished_as_a_fresh_fit_says(run):
    """Cluster sizes and penalties of the second step, from the first step's fingerprints by a fresh fit and a vote."""
    first, second = (pq.read_table(run / "rollouts" / f"step_{step:06d}.parquet").to_pylist() for step in (1, 2))
    checked = 0
    for row in second:
        if row["fingerprint"] is None or row["correct"]:
            assert row["penalty"] == 0
            continue
        history = [r["fingerprint"] for r in first if r["key"] == row["key"] and r["fingerprint"] is not None]
        expected = plain_cluster_size(np.array(history), np.array(row["fingerprint"])) if history else 0
        assert row["cluster_size"] == expected
        assert row["penalty"] == pytest.approx(0.1 * min(np.log(expected + 1), 2), abs=1e-6)
        assert row["shaped_score"] == pytest.approx(row["score"] - row["penalty"], abs=1e-6)
        checked += expected > 0
    assert checked > 10


def plain_cluster_size(history_NL: np.ndarray, fingerprint_L: np.ndarray) -> int:
    unit_NL = history_NL / np.linalg.norm(history_NL, axis=1, keepdims=True)
    if len(unit_NL) < 2:
        labels_N = np.full(len(unit_NL), -1)
    else:
        labels_N = hdbscan.HDBSCAN(min_cluster_size=2, min_samples=1).fit_predict(unit_NL)
    similarity_N = unit_NL @ (fingerprint_L / np.linalg.norm(fingerprint_L))
    nearest = np.argsort(-similarity_N, kind="stable")[:3]
    values, votes = np.unique(labels_N[nearest], return_counts=True)
    return int((labels_N == values[votes.argmax()]).sum())


def test_fingerprints_of_the_first_step_are_those_of_transformers(run, small_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from meds_megatron.rollout.answer_position import AnswerLocator

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    locator = AnswerLocator(tokenizer)
    rows = pq.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    with_fingerprint = [row for row in rows if row["fingerprint"] is not None]
    checked = 0
    for row in with_fingerprint[::5]:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        response_ids = row["response_token_ids"]
        position, _ = locator.locate(response_ids)
        tokens_T = torch.tensor([prompt_ids + response_ids])
        with torch.no_grad():
            hidden = model(tokens_T, output_hidden_states=True).hidden_states[1:]
        states_LH = torch.stack([h[0, len(prompt_ids) + position] for h in hidden])
        expected_L = states_LH @ model.lm_head.weight[response_ids[position + 1]]
        assert np.abs(np.array(row["fingerprint"]) - expected_L.detach().numpy()).max() < 1e-4
        checked += 1
    assert checked > 5


def test_export_is_a_model_that_transformers_loads(run, small_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert [path.name for path in sorted((run / "hf").iterdir())] == ["step_000002", "step_000003"]

    export = run / "hf" / f"step_{STEPS:06d}"
    trained = AutoModelForCausalLM.from_pretrained(export).state_dict()
    before = AutoModelForCausalLM.from_pretrained(small_model).state_dict()
    assert AutoTokenizer.from_pretrained(export).chat_template
    assert trained.keys() == before.keys()
    assert all(trained[name].shape == before[name].shape for name in before)
    moved = [name for name in before if not torch.equal(trained[name], before[name])]
    assert len(moved) == len(before)


def test_export_is_a_model_that_vllm_loads(run):
    import ray

    from meds_megatron.config import load_config
    from meds_megatron.launch.placement import Placement
    from meds_megatron.rollout.pool import EnginePool
    from meds_megatron.rollout.settings import Sampling

    config = load_config("configs/quickstart.yaml", ["cluster.device=cpu"])
    ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        export = str(run / "hf" / f"step_{STEPS:06d}")
        placement = Placement(config.cluster, use_gpu=False)
        pool = EnginePool(config, export, use_gpu=False, placement=placement, disk_version=0)
        pool.start()
        (completions,) = pool.generate([[40, 41, 42]], Sampling(responses=3, max_tokens=20), seed=0)
        assert len(completions) == 3 and all(len(completion.token_ids_R) for completion in completions)
        pool.close()
    finally:
        ray.shutdown()


def test_a_run_that_cannot_start_leaves_nothing_behind(small_model, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(small_model, broken)
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    command = [sys.executable, "-m", "meds_megatron.cli", "train", "configs/quickstart.yaml"]
    command += [f"run_dir={tmp_path / 'run'}", "model.make=no", f"model.path={broken}", "cluster.device=cpu"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "model.safetensors" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_run_does_not_write_into_the_first(run):
    command = [sys.executable, "-m", "meds_megatron.cli", "train", "configs/quickstart.yaml", f"run_dir={run}"]
    command += ["model.make=no", "model.path=" + str(run / "hf" / f"step_{STEPS:06d}")]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "there already is a run" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
