import pytest
import torch
from safetensors.torch import load_file

from meds_megatron.weights.shard_file import ShardFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_written_in_any_order_reads_as_safetensors(tmp_path, dtype):
    tensors = {"a.weight": torch.randn(7, 3), "b": torch.randn(5), "c": torch.randn(2, 9)}
    path = tmp_path / "x.safetensors"
    file = ShardFile(path, {name: tuple(t.shape) for name, t in tensors.items()}, dtype)
    for name in ("c", "a.weight", "b"):
        file.write(name, tensors[name])
    assert not path.exists()
    file.close()
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name].to(dtype)) for name in tensors)


def test_a_transposed_tensor_is_written_by_value(tmp_path):
    tensor = torch.randn(4, 6)
    file = ShardFile(tmp_path / "x.safetensors", {"t": (6, 4)}, torch.float32)
    file.write("t", tensor.T)
    file.close()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], tensor.T)


def test_an_incomplete_file_never_gets_its_name(tmp_path):
    path = tmp_path / "x.safetensors"
    file = ShardFile(path, {"a": (2,), "b": (3,)}, torch.float32)
    file.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="lacks b"):
        file.close()
    with pytest.raises(ValueError, match=r"b is \[2\], announced as \[3\]"):
        file.write("b", torch.zeros(2))
    assert not path.exists()
