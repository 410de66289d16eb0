"""Results of data-parallel ranks as one: rows back in their places, sums added up."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meds_megatron.actor.schedule import NOT_SCHEDULED, schedule
from meds_megatron.actor.train_batch import ForwardOutput, UpdateOutput
from meds_megatron.config import Config
from meds_megatron.config.layout import ParallelLayout
from meds_megatron.trainer.policy_group import LOCAL_LAYERS, PolicyGroup, add_up, scatter


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(NOT_SCHEDULED, 2)), min_size=1, max_size=20), st.integers(1, 4)
)
def test_outputs_return_to_their_rows(rows, ranks):
    lengths_B = np.array([length for length, _ in rows])
    minibatches_B = np.array([minibatch for _, minibatch in rows])
    work = schedule(lengths_B, lengths_B, minibatches_B, ranks, micro_batch_tokens=12)
    outputs = []
    for rank_rows in work.rows:
        tokens_R = np.repeat(rank_rows + 1, lengths_B[rank_rows]).astype(np.float32)
        outputs.append(ForwardOutput(tokens_R, -tokens_R, np.repeat(rank_rows[:, None] + 1, 3, axis=1)))
    whole = scatter(outputs, work.rows, lengths_B)
    expected_B = np.where(minibatches_B == NOT_SCHEDULED, 0, np.arange(len(rows)) + 1)
    assert whole.logprobs_R.tolist() == np.repeat(expected_B, lengths_B).tolist()
    assert whole.entropy_R.tolist() == (-whole.logprobs_R).tolist()
    assert whole.fingerprints_BL.tolist() == np.repeat(expected_B[:, None], 3, axis=1).tolist()


def test_an_update_is_the_sum_over_the_data_parallel_ranks():
    parts = (
        UpdateOutput(0.5, {"tokens": 3.0, "kl": 0.25}, 2.0, 1e-6, skipped=False),
        UpdateOutput(1.0, {"tokens": 5.0, "kl": 1.0}, 2.0, 1e-6, skipped=False),
    )
    assert add_up(parts) == UpdateOutput(1.5, {"tokens": 8.0, "kl": 1.25}, 2.0, 1e-6, skipped=False)


@pytest.mark.parametrize(
    ("device", "fused", "warns"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_a_run_on_gpus_says_that_its_layers_are_not_fused(device, fused, warns, caplog):
    def method(result):
        return SimpleNamespace(remote=lambda *_: result)

    group = PolicyGroup.__new__(PolicyGroup)
    group.layout, group._config, group._model_dir = ParallelLayout(), Config(), ""
    group._config.cluster.device = device
    group._workers = [SimpleNamespace(open_store=method(None), start=method(fused))]
    group._supervisor = SimpleNamespace(results=list)
    group.start()
    assert (LOCAL_LAYERS in caplog.text) == warns
