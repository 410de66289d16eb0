"""Conversion of a model of several hundred MB in the memory of about one layer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.weights.table import bucket_sizes, build_table
from tests.limits import HANG_SECONDS
from tests.weights.hf_cases import make_source

pytestmark = pytest.mark.usefixtures("processes")

SIZES = dict(hidden_size=2048, num_hidden_layers=5, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
CONFIG = SIZES | dict(intermediate_size=6144, vocab_size=12_000, tie_word_embeddings=False, rope_theta=1e6)


def test_peak_memory_is_about_one_bucket(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG | {"architectures": ["Qwen3ForCausalLM"]}))
    table = build_table(ModelShape.from_hf(source))
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in table.hf_shapes.items()}
    save_file(tensors, source / "model.safetensors")
    small = make_source(tmp_path / "small", "qwen3 untied")
    program = str(Path(__file__).with_name("conversion_memory.py"))
    done = subprocess.run(
        [sys.executable, program, small, source, tmp_path / "out"], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    bucket_bytes = 2 * max(bucket_sizes(table))
    model_bytes = 2 * sum(bucket_sizes(table))
    assert model_bytes > 5.5 * bucket_bytes > 500e6
    # What malloc keeps for the next block, and the mapped pages of safetensors, come on top of the bucket.
    assert max(peaks["to_mcore"], peaks["to_hf"]) < 2 * bucket_bytes, peaks
    assert peaks["verify"] < 3 * bucket_bytes, peaks
