"""Imports without what they drag in, each in a fresh process."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures("processes")

MEGATRON = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from meds_megatron.lean_imports import lean_megatron
compile_function = torch.compile
with lean_megatron():
    import meds_megatron.actor.background_save, meds_megatron.actor.policy
left_out = ("wandb", "networkx", "torch._inductor.compile_fx")
assert not set(left_out) & set(sys.modules), set(left_out) & set(sys.modules)
assert torch.compile is compile_function
import wandb
assert wandb.init
"""
VLLM = """
import sys
from meds_megatron.lean_imports import lean_vllm
with lean_vllm():
    from vllm import LLM
    from transformers import AutoTokenizer, GenerationMixin
loaded = {"sklearn", "scipy"} & set(sys.modules)
assert not loaded, loaded
import scipy.signal
assert scipy.signal.resample
"""


def run(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_megatron_is_imported_without_wandb_and_inductor_which_can_be_imported_afterwards():
    run(MEGATRON)


def test_vllm_is_imported_without_scikit_learn_and_scipy_which_can_be_imported_afterwards():
    run(VLLM)


def test_a_package_that_is_imported_already_is_not_hidden():
    run("""
import json, sys
from meds_megatron.lean_imports import hidden
with hidden("json", "wandb"):
    import json.decoder
    try:
        import wandb
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError("wandb was imported")
assert sys.modules["json"] is json
""")
