"""An export of training, and a converted checkpoint, give the same log-probs in vLLM and transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meds_megatron.weights.conversion.convert import to_hf
from meds_megatron.weights.conversion.verify import SAMPLE_TEXT, WINDOW, text_tokens, token_logprobs
from tests.devices import tolerance
from tests.limits import HANG_SECONDS
from tests.rollout.engine_cases import make_model
from tests.weights import round_trip
from tests.weights.conversion import checkpoint_ranks
from tests.weights.round_trip import Case

PARALLEL = dict(tensor=2, pipeline=2)


def vllm_logprobs(directory, tokens):
    program = str(Path(__file__).with_name("vllm_logprobs.py"))
    done = subprocess.run(
        [sys.executable, program, directory, json.dumps(tokens)], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", ["qwen2 untied", "qwen3 tied"])
def test_vllm_and_transformers_agree_on_an_export(engine_device, cpu_ranks, tmp_path, name):
    engine_device(1)
    source = make_model(tmp_path / "source", name, seed=3)
    if name == "qwen2 untied":
        cpu_ranks.run(4, round_trip.round_trips, [Case(source, tmp_path / "hf", PARALLEL)])
    else:
        cpu_ranks.run(4, checkpoint_ranks.save, [Case(source, tmp_path / "checkpoint", PARALLEL)])
        to_hf(tmp_path / "checkpoint", tmp_path / "hf")
    tokens = text_tokens(tmp_path / "hf", SAMPLE_TEXT)[:WINDOW]
    expected_T = token_logprobs(source, tokens)
    assert torch.equal(token_logprobs(tmp_path / "hf", tokens), expected_T)
    assert expected_T.std() > 0.5
    assert (vllm_logprobs(tmp_path / "hf", tokens) - expected_T).abs().max() < tolerance(1e-4)
