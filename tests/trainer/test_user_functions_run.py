"""A run with a loss, an advantage and a group filter from a file outside of the package."""

import json

import pyarrow.parquet as pq

FUNCTIONS = '''
import numpy as np
import torch

from meds_megatron.algorithm.advantages import AdvantageOutput
from meds_megatron.algorithm.losses import LossOutput


def reinforce(inputs, config):
    """REINFORCE: no ratio, no clipping."""
    loss_T = -inputs.advantages_T * inputs.logprobs_T
    sums = {"tokens": torch.ones_like(loss_T), "kl": torch.zeros_like(loss_T), "seven": torch.full_like(loss_T, 7.0)}
    return LossOutput((loss_T * inputs.weights_T).sum(), {name: inputs.token_sum(v) for name, v in sums.items()})


def plain_score(inputs, config):
    return AdvantageOutput(inputs.scores_B - 0.25, {"baseline": 0.25})


def odd_groups(batch):
    """Values that differ within groups 1, 3, ... only."""
    return np.arange(len(batch)) * (batch.groups_B % 2)
'''


def test_they_train(run_meds, cpu_engines, small_model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    settings = {
        "policy.loss": f"{file}:reinforce",
        "advantage.estimator": f"{file}:plain_score",
        "filter.metric": f"{file}:odd_groups",
        "parallel.pipeline": 1,
        "cluster.ranks_per_node": 1,
        "data.limit_train": 4,
        "train.steps": 2,
        "train.prompts_per_step": 4,
        "train.mini_batch_prompts": 4,
        "train.validate_every": 0,
        "train.export_hf": "false",
    }
    run = run_meds.finished_run(tmp_path / "run", small_model, settings)
    first, second = run_meds.metrics_of(run)
    for step in (first, second):
        assert step["policy/seven"] == 7.0 and step["policy/kl"] == 0.0 and step["advantage/baseline"] == 0.25
        assert "policy/clip_fraction" not in step and step["policy/grad_norm"] > 0
    rows = [row for file in (run / "rollouts").iterdir() for row in pq.read_table(file).to_pylist()]
    assert {row["group"] for row in rows if row["kept"]} == {1, 3, 5, 7}
    assert {row["group"] for row in rows if not row["kept"]} == {0, 2, 4, 6}
    assert all(abs(row["advantage"] - (row["shaped_score"] - 0.25)) < 1e-6 for row in rows if row["kept"])
    saved = json.loads((run / "functions.json").read_text())
    assert set(saved) == {"policy.loss", "advantage.estimator", "filter.metric"}
