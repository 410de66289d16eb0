"""Settings of an engine's process and of its sampling."""

import json
import subprocess
import sys

import pytest

from meds_megatron.config import Config
from meds_megatron.rollout.llm import stop_token_ids
from meds_megatron.rollout.settings import Sampling, engine_env_vars


@pytest.mark.usefixtures("processes")
def test_the_driver_imports_no_vllm():
    code = "import sys, meds_megatron.rollout.producer; print('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_env_vars_are_strings_from_the_config():
    config = Config()
    config.rollout.threads = 3
    on_cpu, on_gpu = engine_env_vars(config, use_gpu=False), engine_env_vars(config, use_gpu=True)
    assert on_cpu["OMP_NUM_THREADS"] == "3"
    assert "TORCHDYNAMO_DISABLE" not in on_cpu
    assert not any(name.startswith(("VLLM_CPU", "OMP", "TORCHDYNAMO")) for name in on_gpu)
    assert all(isinstance(value, str) for value in on_cpu.values())
    config.rollout.enforce_eager = True
    assert engine_env_vars(config, use_gpu=False)["TORCHDYNAMO_DISABLE"] == "1"


def test_sampling_of_training_and_validation():
    config = Config()
    assert Sampling.training(config.rollout) == Sampling(16, 3072, temperature=1.0, top_p=1.0, top_k=-1)
    assert Sampling.validation(config.rollout) == Sampling(1, 3072, temperature=1.0, top_p=1.0, top_k=-1)


def test_stop_tokens_come_from_tokenizer_and_model(tmp_path):
    assert stop_token_ids(tmp_path, 5) == [5]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert stop_token_ids(tmp_path, 5) == [3, 5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert stop_token_ids(tmp_path, None) == [5, 7]


@pytest.mark.usefixtures("processes")
def test_a_model_that_the_cpu_cannot_run_is_refused_by_name(tmp_path):
    from transformers import Qwen3Config

    sizes = dict(hidden_size=64, num_attention_heads=4, head_dim=16, num_key_value_heads=4)
    Qwen3Config(**sizes, architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    # In a process of its own: importing vLLM changes settings of torch.
    code = f"from meds_megatron.rollout.llm import check_cpu_can_run; check_cpu_can_run({str(tmp_path)!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError" in run.stderr
    assert "attention heads of size 16, and vLLM without CUDA has only 32, 64, 80" in run.stderr
