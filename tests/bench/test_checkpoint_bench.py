from dataclasses import replace

import pytest

from meds_megatron.config.model_shape import QWEN

SHAPE = replace(QWEN["Qwen2.5-0.5B"], vocab_size=512, hidden_size=64, num_layers=4, ffn_size=128)


@pytest.mark.usefixtures("processes")
def test_figures_of_a_small_model(tmp_path):
    from meds_megatron.bench.checkpoint import run

    result = run(str(tmp_path), rounds=1, shape=SHAPE)
    assert result["bytes"] > 0 and list(tmp_path.iterdir()) == []
    assert result["begin_s"] <= result["critical_s"]
    assert result["begin_s"] <= result["written_s"]
    assert result["ratio"] == result["critical_s"] / result["synchronous_s"]
    assert result["digest_ratio"] == result["digest_s"] / result["written_s"] > 0
