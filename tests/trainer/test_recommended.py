"""A whole run in the recommended setting, its memory recomputed from the rollout files alone."""

import json
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from meds_megatron.config import Config, load_config
from tests.memory.reference import PlainMemory

STEPS = 3
PROMPTS = 4
RESPONSES = 8


@pytest.fixture(scope="module")
def run(small_model, tmp_path_factory, cpu_engines):
    """The directory of a finished run over the same few problems again and again, on DP2."""
    directory = tmp_path_factory.mktemp("run") / "recommended"
    command = [sys.executable, "-m", "meds_megatron.cli", "train", "configs/meds_recommended.yaml"]
    settings = {
        "base": "configs/quickstart.yaml",
        "run_dir": directory,
        "model.make": "no",
        "model.path": small_model,
        "cluster.device": "cpu",
        "parallel.pipeline": 1,
        "data.limit_train": PROMPTS,
        "rollout.responses_per_prompt": RESPONSES,
        "rollout.max_response_tokens": 18,  # some responses are cut off before their answer
        "filter.max_batches": 3,
        "train.steps": STEPS,
        "train.prompts_per_step": PROMPTS,
        "train.mini_batch_prompts": PROMPTS // 2,
        "train.micro_batch_responses": 4,
        "train.validate_every": 0,
        "train.export_hf": "false",
    }
    command += [f"{key}={value}" for key, value in settings.items()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return directory


@pytest.fixture(scope="module")
def config(run) -> Config:
    return load_config(run / "config.yaml")


@pytest.fixture(scope="module")
def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rollouts(run) -> list[list[dict]]:
    """The responses of each step."""
    return [pq.read_table(run / "rollouts" / f"step_{step:06d}.parquet").to_pylist() for step in range(1, STEPS + 1)]


def test_the_switches_are_on_and_steps_are_sound(config, metrics):
    assert (config.filter.metric, config.memory.remember_filtered) == ("shaped", True)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert line["mismatch/logprob_abs_max"] < 1e-3
        assert line["policy/kl_first_update"] < 1e-7
        for name in ("keys", "clusters", "noise_share", "hit_share", "saturated_share", "top_eigenvalue_share"):
            assert f"memory/{name}" in line
        for shard in range(2):
            assert line[f"memory/lookup_seconds_shard_{shard}"] <= line["memory/lookup_seconds_max"]
            assert line[f"memory/recluster_seconds_shard_{shard}"] <= line["memory/recluster_seconds_max"]


def test_sizes_are_those_of_every_mistake_of_earlier_steps(config, metrics, rollouts):
    memories = defaultdict(lambda: PlainMemory(config.memory))
    no_answer: Counter[str] = Counter()
    recurring = 0
    for line, rows in zip(metrics, rollouts, strict=True):
        mistakes = [row for row in rows if not row["correct"]]
        for row in mistakes:
            if row["fingerprint"] is None:
                expected = no_answer[row["key"]]
            else:
                expected = memories[row["key"]].size(np.array(row["fingerprint"]))
            assert row["cluster_size"] == expected
            assert row["penalty"] == pytest.approx(0.1 * min(np.log(expected + 1), 2), abs=1e-6)
            recurring += expected > 0
        for key in {row["key"] for row in mistakes}:
            mine = [row["fingerprint"] for row in mistakes if row["key"] == key]
            no_answer[key] += mine.count(None)
            memories[key].remember(np.array([fingerprint for fingerprint in mine if fingerprint is not None]))
        assert line["memory/vectors"] == sum(len(memory.vectors) for memory in memories.values())
        assert line["memory/no_answer"] == sum(no_answer.values())
    assert recurring > 20
    assert sum(no_answer.values()) > 0 and not all(row["kept"] for rows in rollouts for row in rows)


def test_a_prompt_is_trained_on_when_its_shaped_scores_differ(rollouts):
    for rows in rollouts:
        kept = 0
        for group in sorted({row["group"] for row in rows}):
            members = [row for row in rows if row["group"] == group]
            spread = len({row["shaped_score"] for row in members}) > 1
            assert members[0]["kept"] == (spread and kept < PROMPTS)
            kept += members[0]["kept"]
        assert sum(row["advantage"] is not None for row in rows) == kept * RESPONSES


def test_unsolved_prompts_have_advantages_below_full_size(rollouts):
    found = 0
    for rows in rollouts:
        for group in {row["group"] for row in rows if row["kept"]}:
            members = [row for row in rows if row["group"] == group]
            if not any(row["correct"] for row in members):
                scores = np.array([row["shaped_score"] for row in members])
                expected = (scores - scores.mean()) / (max(scores.std(ddof=1), 0.4) + 1e-6)
                assert [row["advantage"] for row in members] == pytest.approx(expected, abs=1e-5)
                found += 1
    assert found > 0
