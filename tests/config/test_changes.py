from dataclasses import replace

import pytest

from meds_megatron.config import Config
from meds_megatron.config.changes import changes, is_free_to_change
from meds_megatron.config.load import schema_types


@pytest.mark.parametrize("key", ["parallel.tensor", "cluster.nodes", "train.steps", "rollout.engines", "wandb.project"])
def test_layout_and_length_are_free_to_change(key):
    assert is_free_to_change(key)


@pytest.mark.parametrize(
    "key",
    [
        "penalty.alpha",
        "optimizer.lr",
        "train.seed",
        "train.prompts_per_step",
        "data.train",
        "model.path",
        "memory.last_n_layers",
        "rollout.temperature",
        "rollout.responses_per_prompt",
        "policy.loss",
    ],
)
def test_what_is_learned_is_not(key):
    assert key in schema_types()
    assert not is_free_to_change(key)


def test_changes_name_key_old_and_new_value():
    saved, present = Config(), Config()
    assert changes(saved, present) == ([], [])
    present.parallel.tensor, present.penalty.alpha = 4, 0.02
    present.train = replace(present.train, steps=200)
    assert changes(saved, present) == (
        ["parallel.tensor: 1 -> 4", "train.steps: 100 -> 200"],
        ["penalty.alpha: 0.1 -> 0.02"],
    )
