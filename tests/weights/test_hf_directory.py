import pytest
import torch
from safetensors.torch import load_file

from meds_megatron.config.model_shape import ModelShape
from meds_megatron.errors import UserError
from meds_megatron.weights.hf_directory import finish_hf, write_tensors
from meds_megatron.weights.table import build_table

SHAPE = ModelShape("qwen3", 16, 2, 4, 2, 4, 24, 30, True, 1e6, 1e-6, 64)


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_read_as_safetensors(tmp_path, dtype):
    tensors = {"a.weight": torch.randn(7, 3), "b": torch.randn(5), "c": torch.randn(2, 9), "d": torch.randn(4)}
    buckets = [{name: tensors[name] for name in names} for names in (["a.weight"], ["b", "c"], ["d"])]
    write_tensors(buckets, shapes_of(tensors), tmp_path, 3, dtype, max_file_bytes=21 * dtype.itemsize)
    files = [load_file(path) for path in sorted(tmp_path.iterdir())]
    # A file holds 21 elements, or one larger tensor.
    assert [set(file) for file in files] == [{"a.weight"}, {"b"}, {"c"}, {"d"}]
    read = {name: tensor for file in files for name, tensor in file.items()}
    assert all(torch.equal(read[name], tensors[name].to(dtype)) for name in tensors)
    assert not any(buckets)


def test_a_transposed_tensor_is_written_by_value(tmp_path):
    tensor = torch.randn(4, 6)
    write_tensors([{"t": tensor.T}], {"t": (6, 4)}, tmp_path, 0, torch.float32)
    (path,) = tmp_path.iterdir()
    assert torch.equal(load_file(path)["t"], tensor.T)


def test_a_tensor_that_was_not_announced_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"b, \[2\], is written in the place of \('b', \(3,\)\)"):
        write_tensors([{"b": torch.zeros(2)}], {"b": (3,)}, tmp_path, 0, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.popitem(), "the export .*out lacks 1 tensors, the first is model.norm.weight"),
        (lambda tensors: tensors.update(x=torch.zeros(2)), r"stage-0000-0000.safetensors has an unexpected x, \[2\]"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(5)}),
            r"has an unexpected model.norm.weight, \[5\]",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_an_incomplete_export_is_refused(tmp_path, change, message):
    tensors = {name: torch.zeros(shape) for name, shape in build_table(SHAPE).hf_shapes.items()}
    change(tensors)
    write_tensors([dict(tensors)], shapes_of(tensors), tmp_path, 0, torch.float32)
    with pytest.raises(UserError, match=message):
        finish_hf(SHAPE, tmp_path / "out", tmp_path, tmp_path, torch.float32)


def test_a_cut_file_and_a_tensor_in_two_files_are_refused(tmp_path):
    tensors = {name: torch.zeros(shape) for name, shape in build_table(SHAPE).hf_shapes.items()}
    for stage in range(2):
        write_tensors([dict(tensors)], shapes_of(tensors), tmp_path, stage, torch.float32)
    with pytest.raises(UserError, match=r"stage-0001-0000\.safetensors has an unexpected model\.embed_tokens\.weight"):
        finish_hf(SHAPE, tmp_path / "out", tmp_path, tmp_path, torch.float32)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
        path.rename(tmp_path / "stage-0000-0000.safetensors")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        finish_hf(SHAPE, tmp_path / "out", tmp_path, tmp_path, torch.float32)
