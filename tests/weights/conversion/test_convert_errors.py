"""Conversions that fail: one sentence, and no incomplete directory is left."""

import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from meds_megatron.errors import UserError
from meds_megatron.weights.conversion.checkpoint import is_checkpoint
from meds_megatron.weights.conversion.convert import to_hf, to_mcore
from meds_megatron.weights.directory import new_directory, writing_directory
from meds_megatron.weights.hf_weights import HfWeights
from tests.weights.hf_cases import make_source, tensors_in


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    out = tmp_path_factory.mktemp("originals")
    source = make_source(out / "source", "qwen2 untied")
    to_mcore(source, out / "checkpoint", chunk_bytes=3000)
    return source, out / "checkpoint"


@pytest.fixture
def source(originals, tmp_path):
    return shutil.copytree(originals[0], tmp_path / "source")


@pytest.fixture
def checkpoint(originals, tmp_path):
    return shutil.copytree(originals[1], tmp_path / "checkpoint")


def refused(convert, directory, out):
    """The sentence of a conversion that leaves nothing behind."""
    with pytest.raises(UserError) as error:
        convert(directory, out)
    left = [path.name for path in out.parent.iterdir() if path.name.startswith((out.name, f".{out.name}"))]
    assert left == []
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_checkpoint(tmp_path, source):
    assert "nowhere does not exist" in refused(to_hf, tmp_path / "nowhere", tmp_path / "out")
    message = refused(to_hf, source, tmp_path / "out")
    assert message.startswith(f"{source} is not a checkpoint: it has no metadata.json and no .metadata")


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "config.json", "__0_4_0.distcp"])
def test_a_missing_file_is_named(checkpoint, tmp_path, name):
    (checkpoint / name).unlink()
    message = refused(to_hf, checkpoint, tmp_path / "out")
    assert str(checkpoint) in message and name in message


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "__0_4_0.distcp"])
def test_a_cut_file_is_named(checkpoint, tmp_path, name):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-30])
    assert str(path) in refused(to_hf, checkpoint, tmp_path / "out")


def test_files_that_hold_no_tensors_are_noticed(checkpoint, tmp_path):
    path = checkpoint / "__0_4_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    message = refused(to_hf, checkpoint, tmp_path / "out")
    assert message.startswith(f"{checkpoint}: decoder.layers.") and "in __0_4_0.distcp is damaged" in message


def test_a_description_that_would_run_something_is_not_read(checkpoint, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (checkpoint / ".metadata").write_bytes(pickle.dumps(Trap()))
    assert "posix.mkdir" in refused(to_hf, checkpoint, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


def test_tensors_of_which_a_part_was_never_written(checkpoint, tmp_path):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "decoder.layers.mlp.linear_fc2.weight is stored only in part" in refused(to_hf, checkpoint, tmp_path / "out")


def test_another_format(checkpoint, tmp_path):
    (checkpoint / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "metadata.json says the format is zarr, expected torch_dist" in refused(to_hf, checkpoint, tmp_path / "out")


def test_an_existing_target_is_left_alone(source, checkpoint, tmp_path):
    for convert, directory in ((to_mcore, source), (to_hf, checkpoint)):
        out = tmp_path / convert.__name__
        out.mkdir()
        (out / "precious").write_text("mine")
        with pytest.raises(UserError, match=f"{convert.__name__} exists already"):
            convert(directory, out)
        assert [path.name for path in out.iterdir()] == ["precious"]
        assert not (tmp_path / f".{out.name}.writing").exists()


def test_a_target_that_cannot_be_made(source, tmp_path):
    with pytest.raises(UserError, match=r"config\.json/out cannot be written"):
        to_mcore(source, source / "config.json" / "out")


def test_quantized_weights_and_missing_tensors_are_refused(source, tmp_path):
    tensors = tensors_in(source)
    name = "model.layers.3.mlp.up_proj.weight"
    save_file(tensors | {name: torch.zeros(48, 32, dtype=torch.int8)}, source / "model.safetensors")
    assert "quantized weights cannot be trained" in refused(to_mcore, source, tmp_path / "out")
    tensors.pop(name)
    save_file(tensors, source / "model.safetensors")
    assert f"has no tensor {name}" in refused(to_mcore, source, tmp_path / "out")


def test_a_dtype_that_no_export_has(source, tmp_path):
    save_file({name: tensor.double() for name, tensor in tensors_in(source).items()}, source / "model.safetensors")
    to_mcore(source, tmp_path / "checkpoint")
    assert "holds torch.float64 weights: choose" in refused(to_hf, tmp_path / "checkpoint", tmp_path / "out")
    to_hf(tmp_path / "checkpoint", tmp_path / "out", torch.float32)


def test_mixed_dtypes_are_kept_in_the_checkpoint_and_widened_in_the_export(source, tmp_path):
    before = tensors_in(source)
    halves = {n: t.bfloat16() if "mlp" in n or "k_proj.bias" in n else t for n, t in before.items()}
    save_file(halves, source / "model.safetensors")
    to_mcore(source, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "out")
    after = tensors_in(tmp_path / "out")
    assert all(after[name].equal(tensor.float()) for name, tensor in halves.items())
    stored = pickle.loads((tmp_path / "checkpoint" / ".metadata").read_bytes()).state_dict_metadata
    assert stored["decoder.layers.mlp.linear_fc1.weight"].properties.dtype == torch.bfloat16
    assert stored["decoder.layers.self_attention.linear_qkv.bias"].properties.dtype == torch.float32


@pytest.mark.parametrize("convert", [to_mcore, to_hf])
def test_a_full_disk_leaves_nothing(convert, source, checkpoint, tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    try:
        message = refused(convert, source if convert is to_mcore else checkpoint, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert message.startswith(f"writing {tmp_path / 'out'} failed: ")


@pytest.mark.parametrize("convert", [to_mcore, to_hf])
def test_an_interruption_leaves_nothing(convert, source, checkpoint, tmp_path, monkeypatch):
    calls = []

    def interrupt(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    if convert is to_mcore:
        original = HfWeights.fill
        monkeypatch.setattr(HfWeights, "fill", interrupt)
    else:
        original = torch.empty
        monkeypatch.setattr("torch.empty", interrupt)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(source if convert is to_mcore else checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_tensors_without_a_place_are_named(checkpoint, tmp_path):
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    lost = next(index for index in metadata.storage_data if index.fqn == "decoder.layers.mlp.linear_fc2.weight")
    del metadata.storage_data[lost]
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "decoder.layers.mlp.linear_fc2.weight is stored only in part" in refused(to_hf, checkpoint, tmp_path / "out")


def test_a_directory_that_another_process_writes_is_left_to_it(tmp_path):
    out = tmp_path / "out"
    with new_directory(out) as writing:
        (writing / "file").touch()
        with pytest.raises(UserError, match=r"another process is writing .*out"), new_directory(out):
            pass
    assert [path.name for path in out.iterdir()] == ["file"]


def test_what_an_interrupted_process_left_is_cleared(tmp_path):
    left = writing_directory(tmp_path / "out")
    left.mkdir()
    (left / "half").touch()
    with new_directory(tmp_path / "out") as writing:
        (writing / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_what_got_the_name_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out exists already"), new_directory(out) as writing:
        (writing / "file").touch()
        out.mkdir()
        (out / "precious").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_the_current_directory_can_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with new_directory(".") as writing:
        (writing / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "file"]


def test_a_damaged_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="is not a safetensors index"):
        HfWeights(tmp_path)


def test_a_model_with_a_file_of_the_markers_name_is_no_checkpoint(tmp_path):
    (tmp_path / "metadata.json").write_text("{}")
    assert is_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert not is_checkpoint(tmp_path)
