"""Checkpoints whose keys other layer specs and settings of megatron-core give, written here by hand."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.conversion.convert import to_hf
from meds_megatron.weights.hf_weights import HfWeights
from meds_megatron.weights.table import build_table
from tests.weights.conversion.checkpoint_ranks import copy_files
from tests.weights.hf_cases import make_source, tensors_in, unequal

FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source") / "model", "qwen3 untied")


def parameters(source: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the model by its local name, as one rank holds it without tensor parallelism."""
    weights, found = HfWeights(source), {}
    for name, parameter in build_table(ModelShape.from_hf(source)).parameters.items():
        found[name] = torch.empty(parameter.local_shape(1))
        weights.fill(found[name], parameter, 0, 1)
    return found


def stacked(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters with those of all layers in one tensor."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name, tensor in found.items():
        layers.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(tensor)
    return {key: torch.stack(parts) if ".layers." in key else parts[0] for key, parts in layers.items()}


def fused(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters under the names of Transformer Engine, which keeps an extra state with each of its weights."""
    renamed: dict[str, object] = {}
    for name, tensor in found.items():
        for local, theirs in FUSED.items():
            name = name.replace(local, theirs) if name.endswith("." + local) else name
        renamed[name] = tensor
        renamed[f"{name.rpartition('.')[0]}._extra_state/shard_0_1"] = io.BytesIO(b"anything")
    return renamed


def write(directory: Path, source: Path, state: dict) -> Path:
    """A checkpoint of the given keys, with the additions of a run, such as an optimizer's state."""
    state = state | {"optimizer.state.exp_avg.output_layer.weight": torch.zeros(3)}
    torch_checkpoint.save(state, checkpoint_id=directory, no_dist=True)
    copy_files(source, directory)
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return directory


@pytest.mark.parametrize(
    "keys",
    [
        lambda found: found,
        lambda found: stacked(found),
        lambda found: fused(found),
        lambda found: fused(stacked(found)),
    ],
    ids=["local", "local stacked", "Transformer Engine", "Transformer Engine stacked"],
)
def test_all_names_convert(source, tmp_path, keys):
    checkpoint = write(tmp_path / "checkpoint", source, keys(parameters(source)))
    to_hf(checkpoint, tmp_path / "back")
    assert unequal(tensors_in(source), tensors_in(tmp_path / "back")) == []


def test_vocabulary_padding_of_any_size_is_cut_off(source, tmp_path):
    found = parameters(source)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        found[name] = torch.cat([found[name], torch.full((123, 32), 7.0)])
    to_hf(write(tmp_path / "checkpoint", source, stacked(found)), tmp_path / "back")
    assert unequal(tensors_in(source), tensors_in(tmp_path / "back")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("decoder.layers.mlp.linear_fc2.weight"), "no tensor decoder.layers.mlp.linear_fc2.weight"),
        (lambda s: s.update({"decoder.layers.mlp.gate.weight": torch.ones(8, 2)}), "decoder.layers.mlp.gate.weight"),
        (
            lambda s: s.update({"decoder.final_layernorm.weight": torch.ones(31)}),
            r"decoder.final_layernorm.weight is [31], config.json asks for [32]",
        ),
        (
            lambda s: s.update({"embedding.word_embeddings.weight": torch.ones(260, 32)}),
            "embedding.word_embeddings.weight is [260, 32], config.json asks for [261, 32]",
        ),
        (
            lambda s: s.update({"decoder.layers.self_attention.q_layernorm.weight": torch.ones(7, 8)}),
            "q_layernorm.weight is [7, 8], config.json asks for [8, 8]",
        ),
        (
            lambda s: s.update({"decoder.layers.self_attention.linear_qkv.layer_norm_weight": torch.ones(8, 32)}),
            "holds decoder.layers.0.input_layernorm.weight twice",
        ),
    ],
    ids=["missing", "unknown", "shape", "vocabulary", "layers", "twice"],
)
def test_another_model_than_that_of_config_json(source, tmp_path, change, message):
    state = stacked(parameters(source))
    change(state)
    checkpoint = write(tmp_path / "checkpoint", source, state)
    with pytest.raises(UserError) as refused:
        to_hf(checkpoint, tmp_path / "back")
    assert message in str(refused.value) and str(checkpoint) in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
