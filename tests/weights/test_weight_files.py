"""Directories of weights that cannot be loaded: one sentence that names the file and the tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.hf_weights import HfWeights
from meds_megatron.weights.table import build_table

TIED = ModelShape("qwen3", 16, 2, 4, 2, 4, 24, 30, True, 1e6, 1e-6, 64)
UNTIED = ModelShape("qwen3", 16, 2, 4, 2, 4, 24, 30, False, 1e6, 1e-6, 64)
NORM = "model.layers.1.self_attn.q_norm.weight"


def write(directory, change=lambda tensors: None, shape=TIED):
    tensors = {name: torch.zeros(size) for name, size in build_table(shape).hf_shapes.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def check(directory, shape=TIED):
    HfWeights(directory).check(build_table(shape).hf_shapes)


def test_a_head_beside_tied_embeddings_and_rotary_frequencies_are_ignored(tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = torch.zeros(30, 16)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)

    check(write(tmp_path, add))


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"model\.safetensors has no tensor {NORM}"):
        check(write(tmp_path, lambda tensors: tensors.pop(NORM)))


def test_untied_embeddings_need_a_head(tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors has no tensor lm_head\.weight"):
        check(write(tmp_path), UNTIED)


def test_an_unknown_tensor_is_named(tmp_path):
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(UserError, match=f"holds tensor {bias}, which the model of config.json does not have"):
        check(write(tmp_path, lambda tensors: tensors.update({bias: torch.zeros(16)})))


def test_a_wrong_shape_is_shown_beside_the_expected_one(tmp_path):
    with pytest.raises(UserError, match=rf"{NORM} is \[5\], config.json asks for \[4\]"):
        check(write(tmp_path, lambda tensors: tensors.update({NORM: torch.zeros(5)})))


def test_quantized_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"{NORM} is I8, expected one of BF16, F16, F32, F64"):
        check(write(tmp_path, lambda tensors: tensors.update({NORM: torch.zeros(4, dtype=torch.int8)})))


def test_no_directory_no_safetensors_and_a_cut_file(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        HfWeights(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        HfWeights(tmp_path)
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        HfWeights(tmp_path)


def test_an_index_that_its_files_contradict(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    names = list(build_table(TIED).hf_shapes)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors is named by .* and missing"):
        HfWeights(tmp_path)
    write(tmp_path, lambda tensors: tensors.pop(NORM))
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=f"lacks tensor {NORM}, which .*index.json places there"):
        check(tmp_path)
    index.write_text("{}")
    with pytest.raises(UserError, match="is not a safetensors index"):
        HfWeights(tmp_path)
