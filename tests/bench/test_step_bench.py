"""`meds bench step`: all forms compute the same, and the report is complete."""

from dataclasses import replace

import numpy as np
import pytest

from meds_megatron.bench import step
from meds_megatron.bench.plain_loop import PlainLoop
from meds_megatron.config import QWEN, Config
from tests.devices import tolerance
from tests.model import qwen_cases as cases


def test_the_plain_loop_computes_what_the_policy_does(ranks, tmp_path_factory):
    directory = cases.cached_model(tmp_path_factory, "qwen2 untied")
    ((_, ours, (first, _)),) = ranks.run(1, first_updates, str(directory))
    config = Config()
    config.model.dtype = "float32"
    loop = PlainLoop(directory, config, "cpu", rows=3)
    whole = cases.train_batch()
    logprobs_R, fingerprints_BL = loop.forward(whole)
    assert np.abs(logprobs_R.numpy() - ours.logprobs_R).max() < tolerance(1e-4)
    answers = whole.answer_positions_B >= 0
    assert np.abs(fingerprints_BL.numpy() - ours.fingerprints_BL)[answers].max() < tolerance(1e-4)
    whole.advantages_B = np.random.default_rng(1).standard_normal(cases.RESPONSES).astype(np.float32)
    whole.loss_weights_B = cases.loss_weights(whole, "token_mean")
    whole.logprobs_R = ours.logprobs_R
    loss, norm = loop.update(whole.select(np.flatnonzero(cases.MINIBATCHES_B == 0)))
    assert loss == pytest.approx(first["loss"], abs=tolerance(1e-5))
    assert norm == pytest.approx(first["grad_norm"], rel=tolerance(1e-4))


def first_updates(_rank: int, directory: str):
    return cases.whole_step(cases.make_policy(directory, {}), {}, cases.PACKS)


@pytest.mark.usefixtures("processes")
def test_the_report_compares_every_form(monkeypatch):
    small = replace(QWEN["Qwen2.5-1.5B"], hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96)
    monkeypatch.setitem(QWEN, "small", replace(small, vocab_size=2048))
    report = step.run(["small"], layers=1, responses=8, rounds=1)
    found = report["models"]["small"]
    for form in step.FORMS:
        assert found[form]["tokens_per_second"] > 0 and found[form]["peak_bytes"] > 2**20
        assert found[form]["mfu"] > 0
    assert report["over_plain"] == found["packed"]["tokens_per_second"] / found["plain"]["tokens_per_second"]
    assert report["over_padded"] == found["packed"]["tokens_per_second"] / found["padded"]["tokens_per_second"]
